"""Which engines would load a checkpoint: a table of rules for each, asked before any is started."""
