"""Plans, subscriptions and terms of payment."""
