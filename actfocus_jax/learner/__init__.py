"""What learns: the train state, the step of ActFocus, the supervised step."""
