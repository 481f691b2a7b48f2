"""Which rights open which route. A new route needs a line here: decide who may call it, and write the line.

A right is a scope of a tenant's key, or `operator` for the operator of the platform. A route without a right is open to
everyone and checks the request in another way.

``reads:<kind>``: the answer has personal content, so the read is audited, for an object of that kind.
"""

from __future__ import annotations

from typing import Final

_TABLE = """
agent
    POST   /api/v1/agents                                               write
    GET    /api/v1/agents                                               read
    GET    /api/v1/agents/{agent_id}                                    read
    PATCH  /api/v1/agents/{agent_id}                                    write
    DELETE /api/v1/agents/{agent_id}                                    write
    POST   /api/v1/agents/{agent_id}/sessions/{key}/messages            run
    POST   /api/v1/sessions/{session_key}/takeover                      write
    POST   /api/v1/sessions/{session_key}/release                       write
    GET    /api/v1/runs                                                 read  reads:session
    GET    /api/v1/runs/{run_id}                                        read  reads:session
    GET    /api/v1/runs/{run_id}/timeline                               read  reads:session
    GET    /api/v1/runs/{run_id}/state                                  read
    POST   /api/v1/runs/{run_id}/cancel                                 run
    POST   /api/v1/runs/{run_id}/approval                               run
    POST   /api/v1/runs/{run_id}/resolution                             write
    POST   /api/v1/runs/{run_id}/fork                                   run
billing
    GET    /api/v1/billing/balance                                      read
    GET    /api/v1/billing/usage                                        read
    GET    /api/v1/billing/usage/summary                                read
    POST   /api/v1/billing/usage/rebuild                                operator
    GET    /api/v1/billing/lines/{line_id}/explain                      read operator
    POST   /api/v1/billing/rerate                                       operator
    GET    /api/v1/billing/ledger                                       read
    GET    /api/v1/billing/verdicts/{usage_id}                          read
    GET    /api/v1/billing/reconciliation                               read operator
    GET    /api/v1/meters                                               read operator
    POST   /api/v1/billing/credit                                       operator
    POST   /api/v1/billing/corrections                                  operator
    GET    /api/v1/billing/held                                         read operator
    POST   /api/v1/billing/held/{usage_id}/resolve                      operator
    GET    /api/v1/prices                                               read operator
    POST   /api/v1/prices                                               operator
    POST   /api/v1/plans                                                operator
    GET    /api/v1/plans                                                read operator
    POST   /api/v1/subscriptions                                        operator
    GET    /api/v1/subscriptions                                        read operator
    PATCH  /api/v1/subscriptions/{subscription_id}                      operator
    DELETE /api/v1/subscriptions/{subscription_id}                      operator
    POST   /api/v1/grants                                               admin operator
    GET    /api/v1/grants                                               read operator
    POST   /api/v1/billing/periods/close                                operator
    GET    /api/v1/invoices                                             read operator
    GET    /api/v1/invoices/{invoice_id}                                read operator
    GET    /api/v1/invoices/{invoice_id}/lines                          read operator
    GET    /api/v1/invoices/{invoice_id}/csv                            read operator
    GET    /api/v1/invoices/{invoice_id}/pdf                            read operator
    GET    /api/v1/invoices/{invoice_id}/xml                            read operator
    POST   /api/v1/invoices/{invoice_id}/finalise                       operator
    POST   /api/v1/invoices/{invoice_id}/void                           operator
    POST   /api/v1/invoices/{invoice_id}/uncollectible                  operator
    POST   /api/v1/invoices/{invoice_id}/credit-notes                   operator
    GET    /api/v1/invoices/{invoice_id}/credit-notes                   read operator
    GET    /api/v1/invoices/{invoice_id}/credit-notes/{credit_note_id}/csv read operator
    GET    /api/v1/invoices/{invoice_id}/credit-notes/{credit_note_id}/pdf read operator
    GET    /api/v1/invoices/{invoice_id}/credit-notes/{credit_note_id}/xml read operator
    POST   /api/v1/invoices/{invoice_id}/received                       operator
    POST   /api/v1/invoices/{invoice_id}/received/reverse               operator
    GET    /api/v1/billing/buyer                                        admin
    PUT    /api/v1/billing/buyer                                        admin
    GET    /api/v1/billing/payment-terms                                read operator
    PUT    /api/v1/billing/payment-terms                                operator
    POST   /api/v1/tax-rates                                            operator
    GET    /api/v1/tax-rates                                            read operator
    GET    /api/v1/billing/journal                                      read operator
    POST   /api/v1/budgets                                              admin
    GET    /api/v1/budgets                                              read
    DELETE /api/v1/budgets/{budget_id}                                  admin
    POST   /api/v1/payment-methods                                      admin
    GET    /api/v1/payment-methods                                      admin
    DELETE /api/v1/payment-methods/{method_id}                          admin
    POST   /api/v1/invoices/{invoice_id}/pay                            admin operator
    GET    /api/v1/payments                                             read operator
    GET    /api/v1/payments/reconciliation                              read operator
    GET    /api/v1/payments/{payment_id}                                read operator
    POST   /api/v1/payments/{payment_id}/refunds                        operator
    POST   /webhooks/payments/{name}
channel
    POST   /api/v1/channels                                             write
    GET    /api/v1/channels                                             read
    GET    /api/v1/channels/{channel_id}                                read
    PATCH  /api/v1/channels/{channel_id}                                write
    DELETE /api/v1/channels/{channel_id}                                write
    POST   /api/v1/channels/{channel_id}/test                           write
    POST   /api/v1/channels/{channel_id}/register                       write
    POST   /api/v1/channels/{channel_id}/rotate                         write
    POST   /api/v1/channels/{channel_id}/pause                          write
    POST   /api/v1/channels/{channel_id}/resume                         write
    GET    /api/v1/channels/{channel_id}/health                         read
    GET    /api/v1/messages                                             read  reads:session
    POST   /api/v1/messages/{message_id}/document                       admin
    POST   /api/v1/channels/{channel_id}/messages                       write
    GET    /api/v1/channel-types                                        read
    GET    /api/v1/deliveries                                           read
    GET    /api/v1/deliveries/{delivery_id}                             read
log_aggregator
    GET    /api/v1/audit                                                read operator
    GET    /api/v1/audit/verify                                         read operator
    GET    /api/v1/logs                                                 read operator
    GET    /api/v1/traces/{trace_id}                                    read operator
    GET    /api/v1/deadletters                                          read operator
    POST   /api/v1/deadletters/redrive                                  write operator
    GET    /api/v1/deadletters/{id}                                     read operator  reads:dead_letter
    DELETE /api/v1/deadletters/{id}                                     write operator
    POST   /api/v1/deadletters/{id}/redrive                             write operator
    GET    /api/v1/status                                               read operator
memory
    POST   /api/v1/documents                                            write
    GET    /api/v1/documents                                            read
    PUT    /api/v1/documents/{document_id}                              write
    GET    /api/v1/documents/{document_id}                              read
    PATCH  /api/v1/documents/{document_id}                              write
    DELETE /api/v1/documents/{document_id}                              write
    GET    /api/v1/documents/{document_id}/content                      read  reads:document
    POST   /api/v1/memory/search                                        read  reads:document
    GET    /api/v1/memory/index                                         read
    POST   /api/v1/memories                                             read
    GET    /api/v1/memories                                             read  reads:memory
    GET    /api/v1/memories/{memory_id}                                 read  reads:memory
    PATCH  /api/v1/memories/{memory_id}                                 read
    DELETE /api/v1/memories/{memory_id}                                 read
    POST   /api/v1/memories/{memory_id}/split                           read
notification
    GET    /api/v1/notifications                                        read
    POST   /api/v1/webhook-endpoints                                    write
    GET    /api/v1/webhook-endpoints                                    read
    GET    /api/v1/webhook-endpoints/{endpoint_id}                      read
    PATCH  /api/v1/webhook-endpoints/{endpoint_id}                      write
    DELETE /api/v1/webhook-endpoints/{endpoint_id}                      write
    GET    /api/v1/webhook-endpoints/{endpoint_id}/deliveries           read
    POST   /api/v1/webhook-endpoints/{endpoint_id}/resend               write
    POST   /api/v1/webhook-endpoints/{endpoint_id}/rotate-secret        write
plugin
    GET    /api/v1/tools                                                read
    POST   /api/v1/plugins                                              write
    GET    /api/v1/plugins                                              read
    GET    /api/v1/plugins/{plugin_id}                                  read
    PATCH  /api/v1/plugins/{plugin_id}                                  write
    DELETE /api/v1/plugins/{plugin_id}                                  write
    POST   /api/v1/plugins/{plugin_id}/refresh                          write
user
    POST   /api/v1/tenants                                              operator
    GET    /api/v1/tenants                                              operator
    POST   /api/v1/tenants/{id}/erase                                   operator
    GET    /api/v1/tenants/{id}/erasure                                 operator
    GET    /api/v1/tenant                                               read
    POST   /api/v1/api-keys                                             admin
    GET    /api/v1/api-keys                                             admin
    DELETE /api/v1/api-keys/{id}                                        admin
    POST   /api/v1/members                                              admin
    GET    /api/v1/members                                              admin
    PATCH  /api/v1/members/{id}                                         admin
    DELETE /api/v1/members/{id}                                         admin
    POST   /api/v1/members/{id}/erase                                   admin
    POST   /api/v1/subjects/{id}/erase                                  admin
ws_gateway
    GET    /api/v1/runs/{run_id}/events                                 read  reads:session
    POST   /api/v1/agents/{agent_id}/sessions/{key}/messages            run
    GET    /ws
    GET    /v1/models                                                   read
    GET    /v1/models/{model}                                           read
    POST   /v1/chat/completions                                         run
    POST   /v1/responses                                                run
"""


def _read() -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, dict[str, str]]]:
    rights: dict[str, dict[str, tuple[str, ...]]] = {}
    reads: dict[str, dict[str, str]] = {}
    service = ""
    for line in _TABLE.strip().splitlines():
        if line.startswith(" "):
            method, path, *words = line.split()
            kinds = [word.removeprefix("reads:") for word in words if word.startswith("reads:")]
            rights[service][f"{method} {path}"] = tuple(word for word in words if not word.startswith("reads:"))
            reads[service] |= {f"{method} {path}": kind for kind in kinds}
        else:
            service = line
            rights[service], reads[service] = {}, {}
    return rights, reads


_FOUND = _read()
RIGHTS: Final = _FOUND[0]
"""Service → ``METHOD path`` → the rights; one of them is enough."""
READS: Final = _FOUND[1]
"""Service → ``METHOD path`` → the kind of the object whose read is audited. Other routes show no personal content."""
