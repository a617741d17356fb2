"""How weights move: Muon for matrices, AdamW for the rest, the schedule, the averages."""
