"""What several test modules use. No test module imports another one: what two of them need lives here."""
