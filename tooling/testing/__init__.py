"""What tests and benches stand on."""
