"""Language models: the contract of a request and an answer, the models of providers, and an offline model."""
