"""Memories: facts about people and notes of tenants, and the replies of agents."""
