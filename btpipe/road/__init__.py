"""What concerns the whole road: it sees every stage, and only the command line sees it."""
