"""Agent. Owns: agent definitions, sessions, runs and their journals.

Handles: channel.v1.MessageReceived and MessageChanged (work), MessageDelivered and MessageUndelivered;
agent.v1.RunRequested; user.v1.SubjectErased. Publishes: agent.v1.RunRequested, RunStarted, StepStarted, StepCompleted,
RunIndeterminate, RunCompleted, RunFailed and others; billing.v1.UsageRecorded. Sends: channel.v1.SendMessage. Serves:
HTTP of agents, messages, completions and runs. Calls: memory, billing and plugin by gRPC; model providers by HTTPS.

Rooms, each importing only those below: execution (how a worker executes a run), sessions (how a message reaches a
run), runs (the rules of a run, and requests about it), definitions (agents and their versions), models (providers).
"""
