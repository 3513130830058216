"""The coordinator, step by step: who takes part, what is asked, taken in, merged and published, and by whom."""
