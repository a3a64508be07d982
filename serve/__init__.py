"""Who runs it: engines as command lines, launching, and talking to a server over HTTP."""
