//! What a user or a program writes for a card: options of the command lines, endpoints, card.toml. Each parser gets
//! each text.

use std::path::{Component, Path};

use ccid_device::Device;
use emulated_card::card::Profile;
use emulated_card::keys::pem::PemSource;
use emulated_card::setup::{Keys, Wanted};
use emulated_card::slot::PivSlot;
use vscard_protocol::chardev::Endpoint;

#[path = "../../vscclient/src/new_card/card_file.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod card_file;
#[path = "../../vscclient/src/legacy.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod legacy;
#[path = "../../ccid-device/src/bin/ccid-device/spec.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod spec;
#[path = "../../vscclient/src/vpcd/endpoint.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod vpcd;

use spec::{CardKind, CardSpec, ReaderSpec};

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    if let Ok(endpoint) = text.parse::<Endpoint>() {
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
    if let Ok(endpoint) = vpcd::endpoint(text) {
        assert!(matches!(endpoint, Endpoint::Tcp { port: 1.., .. }), "{endpoint}");
    }
    if let Ok(profile) = text.parse::<Profile>() {
        assert_eq!(text, format!("{profile:?}").to_lowercase());
    }
    if let Ok(slot) = text.parse::<PivSlot>() {
        assert_eq!(slot.to_string(), text.to_lowercase());
    }
    wanted(text);
    pem(text);
    if let Ok(options) = legacy::parse(text) {
        assert!(options.soft.iter().all(|soft| !soft.certificates.is_empty()));
        assert!(options.db.is_none_or(|db| !db.is_empty()));
    }
    if let Ok(card) = text.parse::<CardSpec>() {
        check_card(&card);
    }
    if let Ok(ReaderSpec { usbip, config, endpoint, .. }) = text.parse() {
        assert!(!usbip || endpoint.is_listening());
        assert_eq!(config.check().is_ok(), Device::new(config).is_ok());
    }
    card_toml(text);
}

fn wanted(text: &str) {
    let Ok(Wanted { slot, name }) = text.parse();
    match slot {
        Some(slot) => assert_eq!(text.split_once('='), Some((&text[..2], &*name)), "{slot}"),
        None => assert_eq!(name, text),
    }
}

/// What was understood means the same when it is written again.
fn pem(text: &str) {
    let Ok(source) = PemSource::pem_option(text) else { return };
    let PemSource::Pem { certificate, key } = &source else { panic!("{source:?}") };
    let doubled = |path: &Path| path.to_string_lossy().replace(',', ",,");
    let mut again = doubled(certificate);
    // A name that begins with a comma can only be that of both.
    if key != certificate {
        again = format!("{again},{}", doubled(key));
    }
    assert_eq!(PemSource::pem_option(&again).expect("one file or two"), source);
}

fn check_card(card: &CardSpec) {
    let keep = match &card.kind {
        CardKind::Certificates(setup) => {
            assert!(setup.pin_file.is_none() || !setup.no_pin);
            match &setup.keys {
                Keys::Database(db) => assert!(!db.is_empty() && !setup.certificates.is_empty()),
                Keys::Files(files) => assert!(!files.is_empty()),
                Keys::Token { .. } => panic!("{card:?}"),
            }
            setup.keep_tries
        }
        CardKind::Token(setup) => {
            let Keys::Token { modules, db, .. } = &setup.keys else { panic!("{card:?}") };
            assert!(!modules.is_empty() || db.is_some());
            setup.keep_tries
        }
        CardKind::Raw(raw) => raw.keep_tries,
        CardKind::Passthru { deadline, .. } => {
            assert!((1..=3600).contains(&deadline.as_secs()));
            None
        }
    };
    assert!(keep.is_none_or(|keep| keep <= 15));
}

/// A card is in its directory, and nowhere else.
fn card_toml(text: &str) {
    let Ok(card) = card_file::parse(text) else { return };
    let pem = card.pem.iter().flat_map(|files| [&files.certificate, &files.key]);
    let nss = card.nss.iter().flat_map(|files| [&files.database, &files.password_file]);
    for name in pem.chain(nss) {
        let parts: Vec<_> = Path::new(name).components().collect();
        assert!(matches!(parts[..], [Component::Normal(part)] if part == &**name), "{name:?}");
    }
    let again = toml::to_string(&card).expect("a card is TOML");
    assert_eq!(card_file::parse(&again), Ok(card));
}
