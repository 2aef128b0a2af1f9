"""Shows the meaning of an SAE's latents, and their contributions to the steering of images.

From Python::

    from pathlib import Path

    from vs2_plugin.inspection.findings import inspect_images
    from vs2_plugin.inspection.pages import write_survey
    from vs2_plugin.inspection.pictures import read_image
    from vs2_plugin.inspection.subject import open_subject
    from vs2_plugin.inspection.survey import survey_latents

    subject = open_subject("vs2:ViT-B-32-quickgelu", "openai", "cifar100", "root")
    [finding] = inspect_images(subject, [read_image(Path("photo.jpg"))]).findings
    for line in finding.places[0].lines:
        print(line.name, line.values[0])  # what each latent contributed to the lead
    write_survey(survey_latents(subject), Path("latents"))

From below: notes (texts), latents (statistics) and pictures; subject, a loaded steered model; findings (of images) and
survey (of all latents); pages, which writes both. A single image is explained by model.explanation.
"""
