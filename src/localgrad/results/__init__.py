"""Results of finished runs: reading files, building tables, drawing figures, writing the report."""
