"""The command `pipeline`: training runs and an evaluation after each other, from one file; what is done stays done."""
