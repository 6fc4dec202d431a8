"""AMD GPU machine code as data: what ``inspect`` counts and the virtual GPU executes."""
