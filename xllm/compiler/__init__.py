"""From a checkpoint to a Program, through the passes, to an artifact."""
