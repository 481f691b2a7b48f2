"""Log aggregator. Owns: the audit chains and their stored heads; the search index of log lines, events, spans and acts.

Handles: ActAudited, UsageRecorded, LogLine, agent.events, channel.events. Serves: HTTP for audit, logs, traces, the
dead letters of all services and the state of the system, and an OTLP receiver.

Rooms, side by side: audit (chains and their stored heads), index (documents of the search index).
"""
