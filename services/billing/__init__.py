"""Billing. Owns: accounts, holds, usage and its verdicts, the ledger, the price book.

Handles: billing.v1.UsageRecorded, user.v1.TenantCreated, channel.v1.MessageDelivered.
Publishes: billing.v1.QuotaExhausted. Sends: notification.v1.SendEmail. Serves: HTTP ``/api/v1/billing`` and
``/api/v1/prices``, gRPC ``Billing`` (Reserve, Release, Charges). Calls: the operations gRPC of every service that
produces usage, for the reconciliation.
"""
