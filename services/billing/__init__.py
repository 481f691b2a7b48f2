"""Billing. Owns: accounts, holds, budgets, usage and its sums, the ledger, the journal, the price book, plans,
subscriptions, grants, invoices, payments.

Handles: billing.v1.UsageRecorded, user.v1.TenantCreated, channel.v1.MessageDelivered. Publishes:
billing.v1.QuotaExhausted and BudgetThresholdPassed, also on Redis ``openclaw:quota:exhausted``. Sends:
notification.v1.SendEmail. Serves: HTTP ``/api/v1/billing``, ``prices``, ``meters``, ``plans``, ``subscriptions``,
``grants``, ``budgets``, ``invoices``, ``payments``, ``payment-methods``, ``tax-rates`` and ``/webhooks/payments``; gRPC
``Billing`` (Reserve, Release, Charges, Unpriced). Calls: the operations gRPC of every service that produces usage, for
the reconciliation; payment providers.

Rooms, each importing only those below: payments (providers), usage (records and their sums), invoices, plans
(subscriptions), credit (accounts, journal, holds, grants), rating (prices).
"""
