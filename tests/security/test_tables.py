"""Row-level security by the catalog of PostgreSQL: a new table of a tenant without it is red."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from infra.postgres.schema import migrate, prepare_database
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES
from tooling.testing.platform import PASSWORDS

UNBOUND = {
    "content_read": "ids without content; each statement names the tenant; for the operator the worker role writes it",
    "dead_letter": "read by operations, which compare the tenant of each row",
    "early_message": "the sealed content of messages; only consumers of all tenants read it",
    "erased_tenant": "the ids of erased tenants; only consumers of all tenants write it",
    "idempotency": "each statement names the tenant; for the operator the worker role writes it, without a tenant",
    "lane": "claimed for all tenants in turn",
    "lane_effect": "read by the lane's worker, for all tenants",
    "lane_item": "read by the lane's worker, for all tenants",
    "sequence": "counters of keys, without content",
    "subject_key": "the keys of persons, sealed under the platform's key; each statement names the tenant",
}
"""Table of the kernel, in each service's schema → the reason why row-level security does not bind it."""

TABLES = """
SELECT n.nspname, c.relname, c.relrowsecurity, pg_get_userbyid(c.relowner),
       coalesce(array_agg(p.polname || ' ' || pg_get_expr(p.polqual, p.polrelid) || ' '
                          || coalesce(pg_get_expr(p.polwithcheck, p.polrelid), ''))
                FILTER (WHERE n.nspname || '_request' = ANY(ARRAY(
                    SELECT pg_get_userbyid(r) FROM unnest(p.polroles) r
                ))),
                '{}') AS of_request,
       bool_or(0 = ANY(p.polroles)) AS of_everyone
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped
LEFT JOIN pg_policy p ON p.polrelid = c.oid
WHERE c.relkind IN ('r', 'p') AND n.nspname = ANY($1::text[])
GROUP BY 1, 2, 3, 4
ORDER BY 1, 2
"""
BOUND = "tenant (tenant_id = {schema}.current_tenant()) (tenant_id = {schema}.current_tenant())"


@pytest.fixture(scope="module")
async def tables(database: str) -> list[Any]:
    await prepare_database(database, {name: PASSWORDS for name in SERVICES})
    for name in SERVICES:
        if (revisions := CHECKOUT / "services" / name / "migrations").exists():
            await migrate(database, name, revisions)
    admin = await asyncpg.connect(database)
    found = list(await admin.fetch(TABLES, list(SERVICES)))
    await admin.close()
    return found


async def test_row_level_security_binds_every_table_of_a_tenant(tables: list[Any]) -> None:
    wrong = []
    for schema, table, enabled, _, policies, of_everyone in tables:
        bound = [" ".join(policy.split()) for policy in policies]
        # PostgreSQL quotes the name "user".
        own = [BOUND.format(schema=name) for name in (schema, f'"{schema}"')]
        if table not in UNBOUND and not (enabled and len(bound) == 1 and bound[0] in own and not of_everyone):
            wrong.append((schema, table, enabled, bound))
    assert wrong == []


async def test_the_list_of_exceptions_has_no_table_that_is_bound_or_gone(tables: list[Any]) -> None:
    assert UNBOUND.keys() == {table for _, table, enabled, *_ in tables if not enabled}


async def test_no_role_of_a_process_owns_a_table_or_passes_row_level_security(database: str, tables: list[Any]) -> None:
    """Only owner and superuser pass a policy, so it need not be forced: no process runs as one of them."""
    assert {owner == f"{schema}_owner" for schema, _, _, owner, *_ in tables} == {True}
    admin = await asyncpg.connect(database)
    roles = [f"{name}_{role}" for name in SERVICES for role in ("request", "worker")]
    passing = await admin.fetch(
        """
        SELECT rolname FROM pg_roles WHERE rolname = ANY($1::text[])
          AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb
               OR EXISTS (SELECT FROM pg_auth_members m WHERE m.member = pg_roles.oid))
        """,
        roles,
    )
    await admin.close()
    assert passing == []
