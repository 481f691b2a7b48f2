"""Usage that memory reports to billing, and credit that it asks for."""
