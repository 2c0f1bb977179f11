"""The APIs: requests as each one's clients send them, and answers in its form.

Nothing here knows of an engine or of HTTP: a body becomes a `Completion`, and its
events become JSON.
"""
