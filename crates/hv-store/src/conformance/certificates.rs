//! A certificate authority of its own for each test, with one certificate for both sides.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use crate::etcd::EtcdTls;

/// Writes the files to `dir`. The certificate is good for this machine's loopback addresses.
pub(super) fn write(dir: &Path) -> EtcdTls {
    let (ca, cert, key) = issue().expect("certificates are made");
    let tls = EtcdTls { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") };
    for (path, pem) in [(&tls.ca, ca), (&tls.cert, cert), (&tls.key, key)] {
        fs::write(path, pem).expect("certificates are written");
    }
    tls
}

fn issue() -> Result<(String, String, String), rcgen::Error> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut params = CertificateParams::new(["127.0.0.1", "localhost"].map(String::from))?;
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &authority)?;
    Ok((authority.pem(), certificate.pem(), key.serialize_pem()))
}
