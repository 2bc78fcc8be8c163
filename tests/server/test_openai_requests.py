"""Chats: conversations and tools that are taken in as they are, and what is refused with which words."""
