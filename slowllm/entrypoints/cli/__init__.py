"""The command line: each verb parses its options, calls the engine and prints."""
