"""What the stages stand on: arguments, the command line, the record of a run, resume, the Trainer's side."""
