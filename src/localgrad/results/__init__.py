"""Results of finished runs: read, tabled, drawn, reported."""
