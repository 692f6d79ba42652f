"""What more than one kernel family needs: the counter-based random numbers (Philox)."""
