"""The cost of usage: prices, their schemes and currencies."""
