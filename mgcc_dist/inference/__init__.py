"""Load trained runs and predict."""
