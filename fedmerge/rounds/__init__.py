"""The round: a pure state machine, what is due in it and when, and its memory, from which all else is read."""
