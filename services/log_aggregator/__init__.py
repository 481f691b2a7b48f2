"""Log aggregator. Owns: the audit chains; the search index of log lines, events and spans.

Handles: ActAudited, LogLine, agent.events, channel.events. Serves: audit, logs, traces, the dead letters of all
services, an OTLP receiver.
"""
