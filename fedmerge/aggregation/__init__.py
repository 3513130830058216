"""Steps 9 to 11 in a row: screened task vectors merged, the outer optimizer's step, and what nodes' scores lead to."""
