//! Cards that can be written to.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of it")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use emulated_card::card::{EmulatedCard, Profile};
use emulated_card::keys::KeyStore;
use emulated_card::keys::pem::PemSource;
use emulated_card::keys::writable::ManagementAlgorithm;
use emulated_card::keys::written::{ManagementKey, WrittenError, WrittenStore};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::assign;
use emulated_card::state::StateDirectory;

use crate::common::{PIN, try_card_of};
use crate::openssl_tool::make_certificate;
use vscard_protocol::Secret;

/// The card management key of every Triple DES card, until it gets another.
pub(crate) const TRIPLE_DES: &str = "010203040506070801020304050607080102030405060708";

/// A store in `directory`, made if it is not there: a P-256 key in slot 9A, which asks for nothing but the PIN. `admin`
/// is what its card management key is for: 00, 01 and so on, but for Triple DES.
pub(crate) fn store(directory: &Path, admin: Option<&str>) -> Arc<WrittenStore> {
    try_store(directory, admin).unwrap()
}

pub(crate) fn try_store(directory: &Path, admin: Option<&str>) -> Result<Arc<WrittenStore>, WrittenError> {
    let file = |name| directory.join(name);
    let (certificate, key) = (file("card.crt"), file("card.key"));
    if !certificate.exists() {
        fs::create_dir_all(directory).unwrap();
        make_certificate("Jane", "P-256", &key, &certificate, &["-addext", "keyUsage=digitalSignature"]);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let management = admin.map(|name| {
        let algorithm = match name {
            "3des" => ManagementAlgorithm::TripleDes,
            "aes128" => ManagementAlgorithm::Aes128,
            "aes192" => ManagementAlgorithm::Aes192,
            "aes256" => ManagementAlgorithm::Aes256,
            other => panic!("what is {other:?}?"),
        };
        let counted = || (0..algorithm.key_len()).map(|byte| format!("{byte:02x}")).collect();
        let digits = if name == "3des" { TRIPLE_DES.to_owned() } else { counted() };
        fs::write(file("admin.key"), format!("{digits}\n")).unwrap();
        fs::set_permissions(file("admin.key"), fs::Permissions::from_mode(0o600)).unwrap();
        ManagementKey::read(&file("admin.key"), algorithm).unwrap()
    });
    let sources = [PemSource::Pem { certificate, key }];
    let written = StateDirectory::at(file("written"));
    WrittenStore::open(&sources, None, &[], written, management).map(Arc::new)
}

/// With a PIN of its own.
pub(crate) fn card(store: &Arc<WrittenStore>) -> EmulatedCard {
    let reference = ReferenceData::in_memory_own(&Secret::from(PIN), None, 3).unwrap();
    let slots = assign(store.certificates(), &[]).unwrap();
    try_card_of(store.clone(), reference, Profile::Piv, slots).unwrap()
}
