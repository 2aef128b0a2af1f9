"""What is said where a checkpoint is missing; more of it in test_patches.py."""

import shutil

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.harness.advice import missing_checkpoint
from vs2_plugin.host import Evaluation
from vs2_plugin.modelstring import parse

from .conftest import TINY

OWN = "local-dir-tiny-clip_wds-digits"


def test_checkpoints_of_several_seeds_are_offered_by_name(in_demo):
    spec, run = parse(f"vs2:{TINY}"), Evaluation(f"vs2:{TINY}", "", "wds/other", "digits")
    for count in (1, 5):
        for seed in range(count):
            place = f"store/checkpoints/local-dir-tiny-clip_wds-other-seed{seed}"
            shutil.copytree(f"store/checkpoints/{OWN}", place, dirs_exist_ok=True)
        said = str(missing_checkpoint([(spec, run)], Store.default()))
        more = " and 2 more" if count > 3 else ""
        assert f"other-seed0'{', ' if more else ''}" in said and f"{more}; name one: vs2:{TINY}@" in said
        assert f"@local-dir-tiny-clip_wds-other-seed0); train it with: vs2-train-sae --model {TINY}" in said
