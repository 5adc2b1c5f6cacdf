"""HTTP/1.1 by the byte: what RFC 9110 and RFC 9112 ask of a server, a row for each case, for this server and others."""
