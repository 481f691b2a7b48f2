"""Support for tests and benches: private stacks of engines, running services, fakes of vendors, models and services."""
