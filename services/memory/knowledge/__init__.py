"""Documents: received, stored, cut into passages, replaced and removed."""
