//! The store of PEM and PKCS#12 files, all made and checked by openssl.

#![cfg(all(unix, feature = "pem"))]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "clippy sees the helpers of a test as no test")]

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use emulated_card::keys::pem::{OpenError, PemSource, PemStore};
use emulated_card::keys::{Curve, KeyError, KeyKind, KeyStore, Unlocked};
use proptest::prelude::*;
use tempfile::TempDir;
use vscard_protocol::Secret;

const PASSWORD: &str = "päss word";

/// Runs openssl in `directory` with the words of `line`, and gives its output.
fn openssl(directory: &Path, line: &str) -> Vec<u8> {
    openssl_with(directory, &line.split_whitespace().collect::<Vec<_>>())
}

fn openssl_with(directory: &Path, arguments: &[impl AsRef<OsStr>]) -> Vec<u8> {
    let arguments: Vec<_> = arguments.iter().map(AsRef::as_ref).collect();
    let command =
        Command::new("openssl").args(&arguments).current_dir(directory).stdin(Stdio::null()).output();
    let output = match command {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            panic!("openssl is missing; install the package openssl")
        }
        result => result.unwrap(),
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {arguments:?}: {errors}");
    output.stdout
}

/// A directory with a key pair for each name: `NAME.crt`, `NAME.key`.
struct Files {
    root: TempDir,
}

impl Files {
    fn new(pairs: &[(&str, &str)]) -> Self {
        let files = Self { root: tempfile::tempdir().unwrap() };
        fs::write(files.path("password"), PASSWORD).unwrap();
        for (name, algorithm) in pairs {
            files.pair(name, algorithm);
        }
        files
    }

    fn pair(&self, name: &str, algorithm: &str) {
        let options = match algorithm.strip_prefix("rsa:") {
            Some(bits) => format!("-algorithm rsa -pkeyopt rsa_keygen_bits:{bits}"),
            None => format!("-algorithm ec -pkeyopt ec_paramgen_curve:{algorithm}"),
        };
        self.openssl(&format!("genpkey {options} -out {name}.key"));
        self.openssl(&format!("req -x509 -new -key {name}.key -subj /CN={name} -out {name}.crt"));
        self.openssl(&format!("pkey -in {name}.key -pubout -out {name}.pub"));
        self.owners_alone(&format!("{name}.key"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn openssl(&self, line: &str) -> Vec<u8> {
        openssl(self.root.path(), line)
    }

    fn owners_alone(&self, name: &str) {
        self.mode(name, 0o600);
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// One file made of others.
    fn join(&self, name: &str, parts: &[&str]) {
        let text: Vec<_> = parts.iter().map(|part| fs::read(self.path(part)).unwrap()).collect();
        fs::write(self.path(name), text.concat()).unwrap();
        self.owners_alone(name);
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
        self.owners_alone(name);
    }

    fn pem(&self, certificate: &str, key: &str) -> PemSource {
        PemSource::Pem { certificate: self.path(certificate), key: self.path(key) }
    }

    fn store(&self, name: &str) -> PemStore {
        PemStore::open(&[self.pem(&format!("{name}.crt"), &format!("{name}.key"))], None).unwrap()
    }

    fn open(&self, source: PemSource, password: Option<&str>) -> Result<PemStore, OpenError> {
        PemStore::open(&[source], password.map(|text| Secret::from(text.as_bytes())).as_ref())
    }

    /// The error of a source, which names `file` and holds nothing of a key.
    fn error(&self, source: PemSource, password: Option<&str>, file: &str) -> OpenError {
        let error = self.open(source, password).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&self.path(file).display().to_string()), "{message}");
        assert!(!message.contains("BEGIN") && !message.contains(PASSWORD), "{message}");
        error
    }
}

fn login(store: &PemStore) -> Box<dyn Unlocked> {
    assert!(!store.needs_secret());
    store.unlock(&Secret::default()).unwrap()
}

/// PKCS#1 v1.5 padding of a signature (RFC 8017 §9.2), as a host makes it.
fn padded(data: &[u8], length: usize) -> Vec<u8> {
    let mut block = vec![0xff; length];
    block[..2].copy_from_slice(&[0, 1]);
    let at = length - data.len();
    block[at - 1] = 0;
    block[at..].copy_from_slice(data);
    block
}

/// An unsigned number in DER.
fn der_number(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|&byte| byte != 0).unwrap();
    let sign = if bytes[start] & 0x80 == 0 { &[][..] } else { &[0] };
    let value = [sign, &bytes[start..]].concat();
    [&[0x02, value.len() as u8], &value[..]].concat()
}

fn der_signature(signature: &[u8]) -> Vec<u8> {
    let (r, s) = signature.split_at(signature.len() / 2);
    let numbers = [der_number(r), der_number(s)].concat();
    [&[0x30, numbers.len() as u8], &numbers[..]].concat()
}

#[test]
fn rsa_keys_of_every_size_sign_and_decrypt() {
    for bits in [1024, 2048, 3072, 4096] {
        let files = Files::new(&[("card", &format!("rsa:{bits}"))]);
        let store = files.store("card");
        let certificate = &store.certificates()[0];
        assert_eq!((certificate.name.as_str(), certificate.kind), ("card", KeyKind::Rsa { bits }));
        assert_eq!(certificate.der, files.openssl("x509 -in card.crt -outform DER"));
        assert_eq!(certificate.public_key, files.openssl("pkey -in card.key -pubout -outform DER"));

        let login = login(&store);
        let signature = login.rsa_raw(0, &padded(b"what a host hashed", bits / 8)).unwrap();
        files.write("signature", signature.expose());
        let recovered = files.openssl(
            "pkeyutl -verifyrecover -pubin -inkey card.pub -in signature -pkeyopt rsa_padding_mode:pkcs1",
        );
        assert_eq!(recovered, b"what a host hashed");

        files.write("plain", "for the card alone");
        let encrypted = files.openssl("pkeyutl -encrypt -pubin -inkey card.pub -in plain");
        let decrypted = login.rsa_raw(0, &encrypted).unwrap();
        assert!(decrypted.expose().ends_with(b"\0for the card alone"));
        assert_eq!(decrypted.len(), bits / 8);
    }
}

#[test]
fn rsa_blocks_that_do_not_fit_are_told() {
    let files = Files::new(&[("card", "rsa:1024")]);
    let store = files.store("card");
    let login = login(&store);
    for block in [vec![], vec![0; 127], vec![0; 129], vec![0xff; 128]] {
        assert_eq!(login.rsa_raw(0, &block).unwrap_err(), KeyError::Block);
    }
    // Leading zeros stay.
    assert_eq!(login.rsa_raw(0, &[0; 128]).unwrap().expose(), [0; 128]);
    assert_eq!(login.ecdsa(0, &[1; 32]).unwrap_err(), KeyError::Block);
    assert_eq!(login.ecdh(0, &[4; 65]).unwrap_err(), KeyError::Block);
    assert!(matches!(login.rsa_raw(1, &[0; 128]), Err(KeyError::Failed(_))));
}

#[test]
fn keys_on_curves_sign_and_derive() {
    for (curve, name) in [(Curve::P256, "P-256"), (Curve::P384, "P-384")] {
        let files = Files::new(&[("card", name), ("peer", name)]);
        let store = files.store("card");
        assert_eq!(store.certificates()[0].kind, KeyKind::Ec(curve));
        let length = curve.field_len();
        let login = login(&store);
        for digest_length in [length, length - 1, 20] {
            let digest = vec![0xd1; digest_length];
            let signature = login.ecdsa(0, &digest).unwrap();
            assert_eq!(signature.len(), 2 * length);
            files.write("signature", der_signature(&signature));
            files.write("digest", &digest);
            files.openssl("pkeyutl -verify -pubin -inkey card.pub -in digest -sigfile signature");
        }
        assert_eq!(login.ecdsa(0, &vec![1; length + 1]).unwrap_err(), KeyError::Block);
        assert_eq!(login.rsa_raw(0, &vec![1; length]).unwrap_err(), KeyError::Block);

        let point = files.openssl("pkey -pubin -in peer.pub -outform DER");
        let point = &point[point.len() - 1 - 2 * length..];
        let shared = login.ecdh(0, point).unwrap();
        assert_eq!(shared.expose(), files.openssl("pkeyutl -derive -inkey peer.key -peerkey card.pub"));

        let mut off_curve = point.to_vec();
        off_curve[length] ^= 1;
        let mut compressed = point[..=length].to_vec();
        compressed[0] = 2 + (point[2 * length] & 1);
        for wrong in [&off_curve[..], &compressed, &point[1..], &[0], &[], &vec![4; 2 * length + 1]] {
            assert_eq!(login.ecdh(0, wrong).unwrap_err(), KeyError::Block);
        }
    }
}

#[test]
fn logins_run_side_by_side_and_outlive_the_store() {
    let files = Files::new(&[("card", "rsa:1024")]);
    let store = files.store("card");
    let logins: Vec<_> = (0..4).map(|_| login(&store)).collect();
    drop(store);
    let results = std::thread::scope(|scope| {
        let run = |login: Box<dyn Unlocked>| {
            scope.spawn(move || {
                let results: Vec<_> =
                    (0..50).map(|_| login.rsa_raw(0, &[7; 128]).unwrap().expose().to_vec()).collect();
                assert!(results.iter().all(|result| *result == results[0]));
                results[0].clone()
            })
        };
        let threads: Vec<_> = logins.into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(results.iter().all(|result| *result == results[0]));
}

#[test]
fn one_file_may_hold_both_and_more() {
    let files = Files::new(&[("ca", "P-256"), ("card", "P-256"), ("other", "rsa:512")]);
    // The parameters that `openssl ecparam -genkey` writes first, the issuer's certificate, text between.
    files.openssl("ecparam -name prime256v1 -out parameters");
    files.openssl("ec -in card.key -out old.key");
    files.write("text", "Bag Attributes\n    friendlyName: x\n");
    files.join("all.pem", &["text", "ca.crt", "other.crt", "parameters", "old.key", "text", "card.crt"]);
    let store = files.open(files.pem("all.pem", "all.pem"), None).unwrap();
    assert_eq!(store.certificates()[0].name, "all");
    assert_eq!(store.certificates()[0].der, files.openssl("x509 -in card.crt -outform DER"));
    login(&store).ecdsa(0, &[1; 32]).unwrap();
}

#[test]
fn encrypted_keys_open_with_the_password_alone() {
    let files = Files::new(&[("card", "rsa:1024")]);
    files.openssl("pkey -in card.key -aes256 -passout file:password -out pkcs8.key");
    files.openssl("rsa -in card.key -traditional -aes128 -passout file:password -out traditional.key");
    for key in ["pkcs8.key", "traditional.key"] {
        files.owners_alone(key);
        let source = || files.pem("card.crt", key);
        let store = files.open(source(), Some(PASSWORD)).unwrap();
        login(&store).rsa_raw(0, &[1; 128]).unwrap();
        let wrong = files.error(source(), Some("wrong"), key);
        assert!(matches!(wrong, OpenError::WrongPassword { .. }), "{wrong}");
        let long = files.error(source(), Some(&"x".repeat(1025)), key);
        assert!(matches!(long, OpenError::WrongPassword { .. }), "{long}");
        for none in [None, Some("")] {
            let none = files.error(source(), none, key);
            assert!(matches!(none, OpenError::PasswordNeeded { .. }), "{none}");
        }
    }
    // A password does no harm to a key that has none.
    files.open(files.pem("card.crt", "card.key"), Some(PASSWORD)).unwrap();
}

#[test]
fn pkcs12_files() {
    let files = Files::new(&[("ca", "P-256"), ("card", "P-384")]);
    let export = "pkcs12 -export -in card.crt -inkey card.key -certfile ca.crt";
    let mut named: Vec<_> = export.split(' ').collect();
    named.extend(["-name", "Jäne's key", "-passout", "file:password", "-out", "named.p12"]);
    openssl_with(files.root.path(), &named);
    files.openssl(&format!("{export} -passout file:password -out unnamed.p12"));
    files.openssl(&format!("{export} -passout pass: -out free.p12"));
    for (file, password, name) in [
        ("named.p12", Some(PASSWORD), "Jäne's key"),
        ("unnamed.p12", Some(PASSWORD), "card"),
        ("free.p12", None, "card"),
    ] {
        files.owners_alone(file);
        let store = files.open(PemSource::Pkcs12(files.path(file)), password).unwrap();
        let certificate = &store.certificates()[0];
        assert_eq!((certificate.name.as_str(), certificate.kind), (name, KeyKind::Ec(Curve::P384)));
        assert_eq!(certificate.der, files.openssl("x509 -in card.crt -outform DER"));
        login(&store).ecdsa(0, &[1; 48]).unwrap();
    }
    let source = || PemSource::Pkcs12(files.path("named.p12"));
    assert!(matches!(files.error(source(), None, "named.p12"), OpenError::PasswordNeeded { .. }));
    for wrong in ["wrong", "p\0x"] {
        let wrong = files.error(source(), Some(wrong), "named.p12");
        assert!(matches!(wrong, OpenError::WrongPassword { .. }), "{wrong}");
    }

    files.openssl("pkcs12 -export -nokeys -in card.crt -passout file:password -out nokey.p12");
    files.openssl("pkcs12 -export -nocerts -inkey card.key -passout file:password -out nocert.p12");
    files.openssl(&format!("{export} -legacy -passout file:password -out legacy.p12"));
    for (file, said) in [
        ("nokey.p12", "holds no private key"),
        ("nocert.p12", "holds no certificate"),
        ("legacy.p12", "an algorithm that OpenSSL has given up"),
    ] {
        files.owners_alone(file);
        let error = files.error(PemSource::Pkcs12(files.path(file)), Some(PASSWORD), file).to_string();
        assert!(error.contains(said), "{file}: {error}");
    }
}

#[test]
fn files_that_are_no_pair_are_refused_by_name() {
    let files = Files::new(&[("card", "P-256"), ("other", "P-256"), ("small", "rsa:512")]);
    files.openssl("genpkey -algorithm ed25519 -out ed.key");
    files.openssl("req -x509 -new -key ed.key -subj /CN=ed -out ed.crt");
    files.owners_alone("ed.key");
    files.join("two.key", &["card.key", "other.key"]);
    let key = fs::read_to_string(files.path("card.key")).unwrap();
    files.write("cut.key", &key[..key.len() - 10]);
    files.write("damaged.key", key.replacen("\nM", "\nQ", 1));
    files.write("long.key", vec![b'#'; 64 * 1024 + 1]);
    files.write("empty.key", "");
    let chain: Vec<_> = std::iter::repeat_n("card.crt", 17).collect();
    files.join("chain.crt", &chain);
    files.write("damaged.crt", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n");
    // OpenSSL alone would ask for a password on the terminal.
    let header = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00000000000000000000000000000000\n\n";
    let certificate = fs::read_to_string(files.path("card.crt")).unwrap();
    files.write("asks.crt", certificate.replacen('\n', &format!("\n{header}"), 1));
    for (certificate, key, file, said) in [
        ("card.crt", "other.key", "other.key", "is not that of the certificate"),
        ("small.crt", "small.key", "small.crt", "RSA keys of 512 bits are not supported"),
        ("ed.crt", "ed.key", "ed.crt", "keys are not supported"),
        ("card.crt", "two.key", "two.key", "more than one private key"),
        ("card.crt", "cut.key", "cut.key", "ends in the middle"),
        ("card.crt", "damaged.key", "damaged.key", "damaged private key"),
        ("card.crt", "long.key", "long.key", "longer than 64 KiB"),
        ("card.crt", "empty.key", "empty.key", "no private key"),
        ("card.key", "card.key", "card.key", "no certificate"),
        ("chain.crt", "card.key", "chain.crt", "more than 16"),
        ("damaged.crt", "card.key", "damaged.crt", "damaged certificate"),
        ("asks.crt", "card.key", "asks.crt", "damaged certificate"),
        ("absent.crt", "card.key", "absent.crt", "No such file"),
        ("card.crt", "absent.key", "absent.key", "No such file"),
        (".", "card.key", "", "not a regular file"),
    ] {
        let error = files.error(files.pem(certificate, key), None, file).to_string();
        assert!(error.contains(said), "{certificate},{key}: {error}");
    }
    let error = files.error(PemSource::Pkcs12(files.path("card.key")), None, "card.key").to_string();
    assert!(error.contains("is not a PKCS#12 file"), "{error}");
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let files = Files::new(&[("card", "P-256")]);
    files.join("both.pem", &["card.crt", "card.key"]);
    files.openssl("pkcs12 -export -in card.crt -inkey card.key -passout pass: -out card.p12");
    for mode in [0o640, 0o604, 0o620] {
        for (file, source) in [
            ("card.key", files.pem("card.crt", "card.key")),
            ("both.pem", files.pem("both.pem", "both.pem")),
            ("card.p12", PemSource::Pkcs12(files.path("card.p12"))),
        ] {
            files.mode(file, mode);
            let error = files.error(source, None, file).to_string();
            assert!(error.contains(&format!("open to others (mode {mode:o})")), "{error}");
        }
    }
    files.mode("card.key", 0o400);
    files.mode("card.crt", 0o644);
    files.store("card");
}

/// DER of a tag with these contents.
fn der(tag: u8, contents: &[&[u8]]) -> Vec<u8> {
    let contents = contents.concat();
    let [high, low] = u16::try_from(contents.len()).unwrap().to_be_bytes();
    let header = match contents.len() {
        0..=127 => vec![tag, low],
        128..=255 => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [header, contents].concat()
}

/// A certificate as this program looks at it, with an RSAPublicKey of these numbers.
fn rsa_certificate(numbers: &[&[u8]]) -> Vec<u8> {
    // rsaEncryption, and NULL.
    let algorithm = der(0x30, &[b"\x06\x09\x2A\x86\x48\x86\xF7\x0D\x01\x01\x01\x05\x00"]);
    let key = der(0x03, &[&[0], &der(0x30, numbers)]);
    let time = |time: &[u8]| der(0x17, &[time]);
    let validity = der(0x30, &[&time(b"260101000000Z"), &time(b"280101000000Z")]);
    let (nobody, serial, public_key) = (der(0x30, &[]), der(0x02, &[&[1]]), der(0x30, &[&algorithm, &key]));
    let signed = der(0x30, &[&serial, &algorithm, &nobody, &validity, &nobody, &public_key]);
    der(0x30, &[&signed, &algorithm, &der(0x03, &[&[0, 1]])])
}

/// The private key would be used with a modulus that it does not have.
#[test]
fn a_certificate_is_the_keys_by_its_numbers() {
    let files = Files::new(&[("card", "rsa:2048")]);
    let own = files.openssl("rsa -in card.key -RSAPublicKey_out -outform DER");
    // SEQUENCE (30 82 xx xx) of the two.
    let numbers = &own[4..];
    let shorter = der(0x02, &[&[0], &[0xFF; 128]]);
    let opens = |numbers: &[&[u8]]| {
        fs::write(files.path("made.der"), rsa_certificate(numbers)).unwrap();
        files.openssl("base64 -in made.der -out made.b64");
        let body = fs::read_to_string(files.path("made.b64")).unwrap();
        fs::write(
            files.path("made.crt"),
            format!("-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"),
        )
        .unwrap();
        files.open(files.pem("made.crt", "card.key"), None).map(|store| store.certificates()[0].kind)
    };
    assert_eq!(opens(&[numbers]).unwrap(), KeyKind::Rsa { bits: 2048 });
    let modulus = &numbers[..4 + 257];
    assert!(matches!(opens(&[modulus, &der(0x02, &[&[3]])]), Err(OpenError::Mismatch { .. })));
    // These end as the key's own does.
    let exponent = der(0x02, &[&[1], &own]);
    assert!(matches!(opens(&[&shorter, &exponent]), Err(OpenError::Mismatch { .. })));
    assert!(matches!(opens(&[&shorter, &own]), Err(OpenError::Contents { .. })));
    assert!(matches!(opens(&[numbers, &own]), Err(OpenError::Contents { .. })));
}

#[test]
fn many_certificates_keep_their_order_and_have_names_of_their_own() {
    let files = Files::new(&[("a", "P-256"), ("b", "P-256"), ("c", "rsa:1024")]);
    fs::create_dir(files.path("sub")).unwrap();
    fs::copy(files.path("b.crt"), files.path("sub/a.crt")).unwrap();
    let sources = [files.pem("c.crt", "c.key"), files.pem("a.crt", "a.key"), files.pem("sub/a.crt", "b.key")];
    let store = PemStore::open(&sources, None).unwrap();
    let names: Vec<_> = store.certificates().iter().map(|certificate| certificate.name.clone()).collect();
    let path = |name: &str| files.path(name).display().to_string();
    assert_eq!(names, ["c".to_owned(), path("a.crt"), path("sub/a.crt")]);
    assert!(login(&store).rsa_raw(0, &[1; 128]).is_ok());
    assert!(login(&store).ecdsa(2, &[1; 32]).is_ok());

    let twice = PemStore::open(&[sources[1].clone(), sources[0].clone(), sources[1].clone()], None);
    assert!(matches!(twice, Err(OpenError::KeyTwice { .. })));
    assert!(matches!(PemStore::open(&[], None), Err(OpenError::NoSources)));
    let many = vec![sources[0].clone(); 25];
    assert!(matches!(PemStore::open(&many, None), Err(OpenError::TooManySources { count: 25 })));
}

/// Files that are nearly right: each kind, with what opens it.
fn seeds() -> &'static Vec<(Vec<u8>, bool)> {
    static SEEDS: OnceLock<Vec<(Vec<u8>, bool)>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let files = Files::new(&[("rsa", "rsa:1024"), ("ec", "P-256")]);
        files.openssl("pkey -in ec.key -aes256 -passout file:password -out pkcs8.key");
        files.openssl("ec -in ec.key -aes128 -passout file:password -out traditional.key");
        files.openssl("pkcs12 -export -in ec.crt -inkey ec.key -passout file:password -out ec.p12");
        files.join("rsa.pem", &["rsa.crt", "rsa.key"]);
        files.join("ec.pem", &["ec.key", "ec.crt"]);
        files.join("pkcs8.pem", &["ec.crt", "pkcs8.key"]);
        files.join("traditional.pem", &["traditional.key", "ec.crt"]);
        let read = |name: &str| (fs::read(files.path(name)).unwrap(), name.ends_with("p12"));
        ["rsa.pem", "ec.pem", "pkcs8.pem", "traditional.pem", "ec.p12"].map(read).into()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// A damaged file is an error, or it does no harm; never a panic, never a question on the terminal.
    #[test]
    fn damaged_files_do_no_harm(
        seed in 0..5_usize,
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
    ) {
        let (content, is_pkcs12) = &seeds()[seed];
        let mut content = content.clone();
        for (at, byte, what) in cuts {
            let at = at.index(content.len());
            match what {
                0 => content[at] = byte,
                1 => content.insert(at, byte),
                _ => { content.remove(at); }
            }
        }
        let files = Files { root: tempfile::tempdir().unwrap() };
        files.write("file", &content);
        let source = match is_pkcs12 {
            true => PemSource::Pkcs12(files.path("file")),
            false => files.pem("file", "file"),
        };
        for password in [None, Some(PASSWORD)] {
            if let Ok(store) = files.open(source.clone(), password) {
                let login = login(&store);
                let _ = login.rsa_raw(0, &[1; 128]);
                let _ = login.ecdsa(0, &[1; 32]);
                let _ = login.ecdh(0, &[4; 65]);
            }
        }
    }

    #[test]
    fn rubbish_is_an_error(content in prop::collection::vec(any::<u8>(), 0..600)) {
        let files = Files { root: tempfile::tempdir().unwrap() };
        files.write("file", &content);
        prop_assert!(files.open(files.pem("file", "file"), Some(PASSWORD)).is_err());
        prop_assert!(files.open(PemSource::Pkcs12(files.path("file")), Some(PASSWORD)).is_err());
    }
}
