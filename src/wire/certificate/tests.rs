//! Certificates put together by hand; what the certificate library makes is read in `agent/peers/proof`.

use proptest::prelude::*;

use super::*;

fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut bytes = vec![tag];
    match content.len() {
        length @ 0..0x80 => bytes.push(u8::try_from(length).unwrap()),
        length @ 0x80..0x100 => bytes.extend([0x81, u8::try_from(length).unwrap()]),
        length => {
            bytes.push(0x82);
            bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
    }
    bytes.extend(content);
    bytes
}

fn extension(identifier: &[u8], critical: &[u8], value: &[u8]) -> Vec<u8> {
    element(SEQUENCE, &[&element(OBJECT_IDENTIFIER, &[identifier]), critical, &element(OCTET_STRING, &[value])])
}

fn public_key(key: &[u8]) -> Vec<u8> {
    element(SEQUENCE, &[&element(SEQUENCE, &[&element(OBJECT_IDENTIFIER, &[&[0x2b, 0x65, 0x70]])]), key])
}

/// A certificate with these extensions, and with `more` behind them.
fn certificate(key: &[u8], extensions: &[&[u8]], more: &[u8]) -> Vec<u8> {
    let empty = element(SEQUENCE, &[]);
    let extensions = element(EXTENSIONS, &[&element(SEQUENCE, extensions)]);
    let inner: &[&[u8]] = &[
        &element(VERSION, &[&element(INTEGER, &[&[2]])]),
        &element(INTEGER, &[&[7; 20]]),
        &empty,
        &empty,
        &empty,
        &empty,
        &public_key(key),
        &extensions,
        more,
    ];
    element(SEQUENCE, &[&element(SEQUENCE, inner), &empty, &element(BIT_STRING, &[&[0; 65]])])
}

const PROOF: Proof = Proof { host: 0x0203, mac: [9; 32] };

fn proven() -> Vec<u8> {
    extension(&PROOF_OID_DER, &[], &PROOF.to_extension())
}

#[test]
fn key_and_proof_are_found_between_other_extensions() {
    let name = extension(&[0x55, 0x1d, 0x11], &[], &[0x30, 0]);
    let bytes = certificate(&[1; 32], &[&name, &proven(), &name], &[]);
    let read = AgentCertificate::read(&bytes).unwrap();
    assert_eq!((read.proof, read.public_key), (PROOF, public_key(&[1; 32]).as_slice()));
}

#[test]
fn what_agents_do_not_make_is_refused() {
    let malformed = |part| Err(CertificateError::Malformed { part });
    let read = |bytes: &[u8]| AgentCertificate::read(bytes).map(|read| read.proof);
    let with = |extensions: &[&[u8]]| read(&certificate(&[1; 32], extensions, &[]));
    let value = |value: &[u8]| with(&[&extension(&PROOF_OID_DER, &[], value)]);
    let good = PROOF.to_extension();
    assert_eq!(with(&[]), Err(CertificateError::NoProof));
    assert_eq!(with(&[&extension(&[0x55, 0x1d, 0x11], &[], &good)]), Err(CertificateError::NoProof));
    assert_eq!(with(&[&proven(), &proven()]), malformed("second proof"));
    assert_eq!(with(&[&extension(&PROOF_OID_DER, &[BOOLEAN, 1, 0xff], &good)]), Err(CertificateError::Critical));
    assert_eq!(with(&[&extension(&PROOF_OID_DER, &[BOOLEAN, 1, 0], &good)]), malformed("extension"));
    assert_eq!(with(&[&proven(), &extension(&[1], &[BOOLEAN, 1, 0xff], &[])]), Err(CertificateError::Critical));
    assert_eq!(value(&[OCTET_STRING, 1, 2]), Err(CertificateError::Version { version: 2 }));
    assert_eq!(value(&[]), malformed("proof"));
    assert_eq!(value(&[OCTET_STRING, 0]), malformed("proof"));
    assert_eq!(value(&good[..36]), malformed("proof"));
    assert_eq!(value(&[OCTET_STRING, 2, 1, 0]), malformed("proof"));
    assert_eq!(value(&[good.as_slice(), &[0]].concat()), malformed("proof"));
    let other = extension(&[1], &[], &[]);
    let many: Vec<&[u8]> = std::iter::repeat_n(other.as_slice(), EXTENSIONS_MAX).collect();
    assert_eq!(with(&[many.as_slice(), &[&proven()]].concat()), malformed("list of extensions"));
    assert_eq!(read(&certificate(&[1; 32], &[&proven()], &[5, 0])), malformed("end"));
    assert_eq!(read(&certificate(&[1; 2000], &[&proven()], &[])), Err(CertificateError::TooLong { bytes: 2180 }));
    assert_eq!(read(&[certificate(&[1; 32], &[&proven()], &[]).as_slice(), &[0]].concat()), malformed("frame"));
}

#[test]
fn lengths_have_one_form() {
    for (bytes, content) in [
        (&[4, 1, 9][..], Some(1)),
        (&[4, 0x81, 1, 9], None),
        (&[4, 0x82, 0, 1, 9], None),
        (&[4, 0x80, 9, 0, 0], None),
        (&[4, 0x83, 0, 0, 1, 9], None),
        (&[4, 2, 9], None),
        (&[4], None),
        (&[], None),
        (&[3, 1, 9], None),
    ] {
        assert_eq!(Der(bytes).element(4).map(|(_, content)| content.len()), content, "{bytes:?}");
    }
    let long = element(4, &[&[0; 0x80]]);
    assert_eq!((long.len(), Der(&long).element(4).map(|(_, content)| content.len())), (0x83, Some(0x80)));
}

proptest! {
    #[test]
    fn any_key_and_proof_read_back(host: u16, mac: [u8; 32], key in prop::collection::vec(any::<u8>(), 0..1500)) {
        let proof = Proof { host, mac };
        let bytes = certificate(&key, &[&extension(&PROOF_OID_DER, &[], &proof.to_extension())], &[]);
        let read = AgentCertificate::read(&bytes).unwrap();
        prop_assert_eq!(read.proof, proof);
        prop_assert_eq!(read.public_key, public_key(&key));
    }

    #[test]
    fn one_changed_byte_is_refused_or_read(at in 0usize..300, to: u8) {
        let mut bytes = certificate(&[1; 32], &[&proven()], &[]);
        let at = at % bytes.len();
        bytes[at] = to;
        let _ = AgentCertificate::read(&bytes);
    }

    #[test]
    fn cut_anywhere_it_is_refused(at in 0usize..300) {
        let bytes = certificate(&[1; 32], &[&proven()], &[]);
        let at = at % bytes.len();
        prop_assert!(AgentCertificate::read(&bytes[..at]).is_err());
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = AgentCertificate::read(&bytes);
    }
}
