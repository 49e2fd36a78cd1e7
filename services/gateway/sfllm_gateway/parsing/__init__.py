"""Telling the parts of a chat answer apart: reasoning, content, tool calls. Pure."""
