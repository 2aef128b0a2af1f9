"""The glue to clip_benchmark. Nothing is imported here: ``autoload`` runs at every interpreter start."""
