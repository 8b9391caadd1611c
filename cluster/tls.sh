#!/usr/bin/env bash
# Create a certificate authority and this machine's certificate for TLS between Ray's processes.
#   cluster/tls.sh FOLDER [ca.crt ca.key]
# The first machine creates the authority; pass its ca.crt and ca.key on each other machine. Then set, on every machine
# and for every driver: RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=FOLDER/tls.crt RAY_TLS_SERVER_KEY=FOLDER/tls.key
# RAY_TLS_CA_CERT=FOLDER/ca.crt. The dashboard uses plain HTTP: keep it on loopback, or behind a proxy with TLS.
set -euo pipefail
umask 077
folder=${1:?the folder for the certificates}
mkdir -p "$folder"
if [ $# -ge 3 ]; then
  cp "$2" "$folder/ca.crt"
  cp "$3" "$folder/ca.key"
else
  openssl req -x509 -newkey rsa:3072 -nodes -sha256 -days 365 -subj /CN=mint-ray \
    -keyout "$folder/ca.key" -out "$folder/ca.crt"
fi
names="DNS:$(hostname),DNS:localhost,IP:127.0.0.1"
for address in $(hostname -I); do names="$names,IP:$address"; done
openssl req -newkey rsa:3072 -nodes -sha256 -subj "/CN=$(hostname)" -keyout "$folder/tls.key" -out "$folder/tls.csr"
openssl x509 -req -in "$folder/tls.csr" -sha256 -days 365 -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial \
  -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth' "$names") -out "$folder/tls.crt"
rm "$folder/tls.csr"
