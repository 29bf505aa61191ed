"""Certificates of a test's own authority, made by openssl."""

import ssl
import subprocess

KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def server(folder):
    """The context of a server at 127.0.0.1 whose authority is in the folder's ca.pem."""
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    # OpenSSL takes a certificate that names itself as its issuer for a self-signed one: two names.
    made = (
        f"req -x509 {KEY} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority"
        " -addext basicConstraints=critical,CA:TRUE",
        f"req {KEY} -keyout key.pem -out request.pem -subj /CN=collector",
        "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2"
        " -extfile names",
    )
    for arguments in made:
        command = ["openssl", *arguments.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
