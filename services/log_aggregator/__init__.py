"""Log aggregator. Owns: the audit chains and their stored heads; the search index of log lines, events and spans.

Handles: ActAudited, LogLine, agent.events, channel.events. Serves: HTTP for audit, logs, traces and the dead letters
of all services, and an OTLP receiver.
"""
