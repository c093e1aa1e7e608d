"""What looks at the machine, at artifacts and at a run that is yet to start; and the demo."""
