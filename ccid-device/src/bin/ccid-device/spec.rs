//! The values of `--reader` and `--card`: a kind, options, and last an endpoint, which owns what follows.

use std::path::PathBuf;
use std::time::Duration;

use ccid_device::{DeviceConfig, Layout, Speed};
use emulated_card::keys::pem::PemSource;
use emulated_card::pcsc::PcscConfig;
use emulated_card::setup::{CardSetup, Keys, RawSetup, Wanted, shell_word};
use vscard_protocol::chardev::Endpoint;

/// `usbredir,...` or `usbip,...`.
#[derive(Clone, Debug)]
pub(crate) struct ReaderSpec {
    pub(crate) usbip: bool,
    /// A guest that migrates takes its card sessions along.
    pub(crate) migrate: bool,
    pub(crate) config: DeviceConfig,
    /// The user said how many slots.
    pub(crate) layout_given: bool,
    /// The user said which serial number.
    pub(crate) serial_given: bool,
    pub(crate) endpoint: Endpoint,
}

/// `cert,...`, `host,...`, `pcsc,...` or `passthru,...`.
#[derive(Clone, Debug)]
pub(crate) struct CardSpec {
    pub(crate) kind: CardKind,
    pub(crate) reader: usize,
    pub(crate) slot: Option<u8>,
}

#[derive(Clone, Debug)]
pub(crate) enum CardKind {
    Certificates(Box<CardSetup>),
    Token(Box<CardSetup>),
    Raw(RawSetup),
    Passthru { deadline: Duration, endpoint: Endpoint },
}

impl CardKind {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Certificates(_) => "cert",
            Self::Token(_) => "host",
            Self::Raw(_) => "pcsc",
            Self::Passthru { .. } => "passthru",
        }
    }
}

/// A year, in seconds: for so long at most a PIN that nobody uses stays verified, if it is to be forgotten.
const LONGEST_VERIFIED: u64 = 365 * 86_400;

/// The parts of a value. A comma inside an option's value is written twice.
struct Parts {
    kind: String,
    options: Vec<(String, Option<String>)>,
    endpoint: Option<Endpoint>,
}

/// Options that may be given more than once.
const REPEATED: [&str; 4] = ["cert", "pem", "p12", "module"];
const ENDPOINTS: [&str; 4] = ["unix:", "unix-listen:", "tcp:", "tcp-listen:"];

fn parts(text: &str) -> Result<Parts, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    let mut endpoint = None;
    while !rest.is_empty() || fields.is_empty() {
        if ENDPOINTS.iter().any(|kind| rest.starts_with(kind)) && !fields.is_empty() {
            endpoint = Some(rest.parse().map_err(|error| format!("{error}"))?);
            break;
        }
        let mut field = String::new();
        let mut chars = rest.char_indices().peekable();
        let mut end = rest.len();
        while let Some((at, char)) = chars.next() {
            if char == ',' && chars.next_if(|(_, next)| *next == ',').is_none() {
                end = at + 1;
                break;
            }
            field.push(char);
        }
        fields.push(field);
        rest = &rest[end..];
    }
    let mut fields = fields.into_iter();
    let kind = fields.next().unwrap_or_default();
    let mut options: Vec<(String, Option<String>)> = Vec::new();
    for field in fields {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (field, None),
        };
        if !REPEATED.contains(&key.as_str()) && options.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key} is given twice"));
        }
        options.push((key, value));
    }
    Ok(Parts { kind, options, endpoint })
}

fn value(key: &str, value: Option<String>) -> Result<String, String> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| format!("{key} needs a value: {key}=..."))
}

fn number<T: std::str::FromStr>(key: &str, text: Option<String>, range: &str) -> Result<T, String> {
    let text = value(key, text)?;
    text.parse().map_err(|_| format!("{key}={text} is not a number ({range})"))
}

fn within<T: std::str::FromStr + PartialOrd + std::fmt::Display>(
    key: &str,
    text: Option<String>,
    range: std::ops::RangeInclusive<T>,
    unit: &str,
) -> Result<T, String> {
    let allowed = format!("{} to {}{unit}", range.start(), range.end());
    match number(key, text, &allowed)? {
        number if range.contains(&number) => Ok(number),
        other => Err(format!("{key}={other} is not within {allowed}")),
    }
}

impl std::str::FromStr for ReaderSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Parts { kind, options, endpoint } = parts(text)?;
        let usbip = match kind.as_str() {
            "usbredir" => false,
            "usbip" => true,
            other => return Err(format!("unknown kind {other:?}; there are usbredir and usbip")),
        };
        let endpoint = endpoint
            .ok_or("the endpoint is missing: unix:PATH, unix-listen:PATH, tcp:... or tcp-listen:...")?;
        if usbip && !endpoint.is_listening() {
            return Err("a USB/IP server listens: tcp-listen:HOST:PORT".into());
        }
        let mut config = DeviceConfig::new(serial(&endpoint));
        let (mut layout_given, mut serial_given, mut migrate) = (false, false, false);
        for (key, text) in options {
            match key.as_str() {
                "slots" | "interfaces" => {
                    if std::mem::replace(&mut layout_given, true) {
                        return Err("slots and interfaces exclude each other, and go once".into());
                    }
                    let count = number(&key, text, "1 to 16 slots, 1 to 7 interfaces")?;
                    let slots = key == "slots";
                    config.layout = if slots { Layout::Slots(count) } else { Layout::Interfaces(count) };
                }
                "speed" => {
                    config.speed = match value(&key, text)?.as_str() {
                        "full" => Speed::Full,
                        "high" => Speed::High,
                        other => return Err(format!("speed={other} is neither full nor high")),
                    }
                }
                "id" => {
                    let id = value(&key, text)?;
                    let parsed = id.split_once(':').and_then(|(vendor, product)| {
                        let hex = |text| u16::from_str_radix(text, 16).ok();
                        Some((hex(vendor)?, hex(product)?))
                    });
                    (config.vendor_id, config.product_id) =
                        parsed.ok_or(format!("id={id} is not VENDOR:PRODUCT in hexadecimal"))?;
                }
                "serial" => {
                    config.serial = value(&key, text)?;
                    serial_given = true;
                }
                "product" => config.product = value(&key, text)?,
                "manufacturer" => config.manufacturer = value(&key, text)?,
                "migrate" => {
                    migrate = match value(&key, text)?.as_str() {
                        "on" => true,
                        "off" => false,
                        other => return Err(format!("migrate={other} is neither on nor off")),
                    }
                }
                "max-message" => config.max_message = number(&key, text, "271 to 65554")?,
                other => {
                    return Err(format!(
                        "unknown option {other:?}; there are slots, interfaces, speed, id, serial, product, \
                         manufacturer, max-message and migrate"
                    ));
                }
            }
        }
        if migrate && usbip {
            return Err("migrate=on is for usbredir: over USB/IP nothing goes along with a guest".into());
        }
        if migrate && !matches!(endpoint, Endpoint::UnixListen { .. }) {
            return Err(format!(
                "migrate=on needs unix-listen:PATH, not {endpoint}: two QEMUs have to reach the reader at a time, and whoever \
                 can do that can go on with a paused guest's card sessions, so it must be this user's processes alone"
            ));
        }
        Ok(Self { usbip, migrate, config, layout_given, serial_given, endpoint })
    }
}

impl std::str::FromStr for CardSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Parts { kind, options, endpoint } = parts(text)?;
        let (mut reader, mut slot) = (0, None);
        let mut rest = Vec::new();
        for (key, text) in options {
            match key.as_str() {
                "reader" => reader = number(&key, text, "0 for the first reader")?,
                "slot" => slot = Some(number(&key, text, "0 for the first slot")?),
                _ => rest.push((key, text)),
            }
        }
        let kind = match kind.as_str() {
            "cert" | "host-certificates" | "host" | "pcsc" if endpoint.is_some() => {
                return Err(format!("a card of kind {kind} has no endpoint"));
            }
            "cert" | "host-certificates" => CardKind::Certificates(Box::new(certificates(rest)?)),
            "host" => CardKind::Token(Box::new(token(rest)?)),
            "pcsc" => CardKind::Raw(raw(rest)?),
            "passthru" | "passthrough" => passthru(rest, endpoint)?,
            other => {
                return Err(format!(
                    "unknown kind {other:?}; there are cert (host-certificates), host, pcsc and passthru \
                     (passthrough)"
                ));
            }
        };
        Ok(Self { kind, reader, slot })
    }
}

/// What all cards of ours have. Gives back what it does not know.
fn common(card: &mut CardSetup, key: &str, text: Option<String>) -> Result<Option<Option<String>>, String> {
    match key {
        // Nothing is written that cannot be parsed.
        "cert" => card.certificates.extend(value(key, text)?.parse::<Wanted>()),
        "card-name" => card.card_name = value(key, text)?,
        "profile" => card.profile = value(key, text)?.parse().map_err(|error| format!("{key}: {error}"))?,
        "forget-pin" => {
            card.forget_pin = Some(Duration::from_secs(within(key, text, 1..=LONGEST_VERIFIED, " seconds")?));
        }
        "keep-tries" => card.keep_tries = Some(within(key, text, 0..=15, "")?),
        _ => return Ok(Some(text)),
    }
    Ok(None)
}

fn certificates(options: Vec<(String, Option<String>)>) -> Result<CardSetup, String> {
    let mut card = CardSetup::default();
    let (mut db, mut files) = (None, Vec::new());
    for (key, text) in options {
        let Some(text) = common(&mut card, &key, text)? else { continue };
        match key.as_str() {
            "db" => db = Some(value(&key, text)?),
            "pem" => {
                files.push(PemSource::pem_option(&value(&key, text)?).map_err(|error| error.to_string())?);
            }
            "p12" => files.push(PemSource::Pkcs12(value(&key, text)?.into())),
            "pin-file" => card.pin_file = Some(PathBuf::from(value(&key, text)?)),
            "puk-file" => card.puk_file = Some(PathBuf::from(value(&key, text)?)),
            "password-file" => card.password_file = Some(PathBuf::from(value(&key, text)?)),
            "no-pin" if text.is_none() => card.no_pin = true,
            other => {
                return Err(format!(
                    "unknown option {other:?}; there are db, cert, pem, p12, profile, card-name, pin-file, puk-file, \
                     password-file, no-pin, forget-pin, keep-tries, reader and slot; a comma in a value, as in \
                     pem=CERT,,KEY, is written twice"
                ));
            }
        }
    }
    match (db, files.is_empty()) {
        (Some(_), false) => return Err("db does not go with pem or p12".into()),
        (_, false) => card.keys = Keys::Files(files),
        (_, true) if card.certificates.is_empty() => {
            return Err("no certificate is named: cert=NAME, once for each".into());
        }
        (Some(db), true) => card.keys = Keys::Database(db),
        (None, true) => {}
    }
    if card.no_pin && card.pin_file.is_some() {
        return Err("no-pin and pin-file exclude each other".into());
    }
    card.unlock = unlock_command(&card);
    Ok(card)
}

/// systemd tells a service alone where its state is.
fn unlock_command(card: &CardSetup) -> Option<String> {
    let state = std::env::var_os("STATE_DIRECTORY");
    let state = state.map(|place| format!("STATE_DIRECTORY={} ", shell_word(place))).unwrap_or_default();
    Some(format!("{state}vscclient unlock {}", card.options()?))
}

fn token(options: Vec<(String, Option<String>)>) -> Result<CardSetup, String> {
    let mut card = CardSetup::default();
    let (mut modules, mut db, mut token) = (Vec::new(), None, None);
    for (key, text) in options {
        let Some(text) = common(&mut card, &key, text)? else { continue };
        match key.as_str() {
            "module" => modules.push(PathBuf::from(value(&key, text)?)),
            "db" => db = Some(value(&key, text)?),
            "token" => token = Some(value(&key, text)?),
            other => {
                return Err(format!(
                    "unknown option {other:?}; there are module, db, token, cert, profile, card-name, forget-pin, \
                     keep-tries, reader and slot"
                ));
            }
        }
    }
    if modules.is_empty() && db.is_none() {
        db = Some("/etc/pki/nssdb".into());
    }
    card.keys = Keys::Token { modules, db, token };
    card.unlock = unlock_command(&card);
    Ok(card)
}

fn raw(options: Vec<(String, Option<String>)>) -> Result<RawSetup, String> {
    let mut raw = RawSetup { config: PcscConfig::default(), keep_tries: None };
    for (key, text) in options {
        match key.as_str() {
            "name" => raw.config.reader = value(&key, text)?,
            "exclusive" if text.is_none() => raw.config.exclusive = true,
            "keep-tries" => raw.keep_tries = Some(within(&key, text, 0..=15, "")?),
            other => {
                return Err(format!(
                    "unknown option {other:?}; there are name, exclusive, keep-tries, reader and slot"
                ));
            }
        }
    }
    Ok(raw)
}

fn passthru(options: Vec<(String, Option<String>)>, endpoint: Option<Endpoint>) -> Result<CardKind, String> {
    let mut deadline = 20;
    for (key, text) in options {
        match key.as_str() {
            "deadline" => deadline = within(&key, text, 1..=3600, " seconds")?,
            other => return Err(format!("unknown option {other:?}; there are deadline, reader and slot")),
        }
    }
    let endpoint = endpoint
        .ok_or("the endpoint is missing: unix-listen:PATH, tcp-listen:HOST:PORT, unix:... or tcp:...")?;
    Ok(CardKind::Passthru { deadline: Duration::from_secs(deadline), endpoint })
}

/// A serial number that is the same at each start and differs between readers of a machine.
fn serial(endpoint: &Endpoint) -> String {
    // FNV-1a.
    let hash = endpoint.to_string().bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    format!("{hash:016X}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_lines() {
        let reader: ReaderSpec = "usbredir,unix:/run/vm1-ccid.sock".parse().unwrap();
        assert!(!reader.usbip && !reader.layout_given);
        assert!(!reader.migrate);
        let reader: ReaderSpec = "usbredir,migrate=on,unix-listen:/run/vm1-ccid.sock".parse().unwrap();
        assert!(reader.migrate);
        let reader: ReaderSpec = "usbip,slots=4,speed=full,tcp-listen:127.0.0.1:3240".parse().unwrap();
        assert_eq!((reader.config.layout, reader.config.speed), (Layout::Slots(4), Speed::Full));
        let card: CardSpec = "cert,db=sql:/d,,x,cert=a,cert=b,slot=2".parse().unwrap();
        let CardKind::Certificates(certificates) = card.kind else { panic!("kind") };
        assert!(matches!(&certificates.keys, Keys::Database(db) if db == "sql:/d,x"));
        let names: Vec<_> = certificates.certificates.iter().map(|wanted| wanted.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!((card.reader, card.slot), (0, Some(2)));
        let card: CardSpec = "host-certificates,pem=a.crt,,a.key,cert=9e=a,profile=piv".parse().unwrap();
        let CardKind::Certificates(files) = card.kind else { panic!("kind") };
        assert!(matches!(&files.keys, Keys::Files(files) if files.len() == 1));
        let card: CardSpec = "host,module=/m.so,token=mine".parse().unwrap();
        let CardKind::Token(token) = card.kind else { panic!("kind") };
        assert!(matches!(&token.keys, Keys::Token { db: None, .. }));
        let card: CardSpec = "pcsc,name=Yubico*,exclusive,reader=1".parse().unwrap();
        assert!(matches!(card.kind, CardKind::Raw(raw) if raw.config.exclusive));
        let card: CardSpec = "passthrough,deadline=5,reader=1,unix-listen:/run/a,,b.sock".parse().unwrap();
        let CardKind::Passthru { deadline, endpoint } = card.kind else { panic!("kind") };
        assert_eq!((deadline.as_secs(), endpoint.to_string().as_str()), (5, "unix-listen:/run/a,,b.sock"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let reader = |text: &str| text.parse::<ReaderSpec>().unwrap_err();
        assert!(reader("usbredir").contains("endpoint is missing"));
        assert!(reader("pci,unix:/x").contains("unknown kind \"pci\""));
        assert!(reader("usbredir,slots=many,unix:/x").contains("slots=many is not a number"));
        assert!(reader("usbredir,slots=1,interfaces=1,unix:/x").contains("exclude each other"));
        assert!(reader("usbip,tcp:localhost:1").contains("listens"));
        for endpoint in ["unix:/x", "tcp:127.0.0.1:1", "tcp-listen:127.0.0.1:1"] {
            let error = reader(&format!("usbredir,migrate=on,{endpoint}"));
            assert!(error.contains("needs unix-listen:PATH") && error.contains(endpoint), "{error}");
        }
        assert!(reader("usbip,migrate=on,tcp-listen:127.0.0.1:1").contains("for usbredir"));
        assert!(reader("usbredir,migrate,unix-listen:/x").contains("migrate needs a value"));
        assert!(reader("usbredir,migrate=yes,unix-listen:/x").contains("neither on nor off"));
        assert!(reader("usbredir,colour=red,unix:/x").contains("unknown option \"colour\""));
        let card = |text: &str| text.parse::<CardSpec>().unwrap_err();
        assert!(card("cert,db=/d").contains("cert=NAME"));
        assert!(card("host,pin-file=x").contains("unknown option \"pin-file\""));
        assert!(card("cert,db=/d,pem=a").contains("db does not go with pem"));
        assert!(card("pcsc,keep-tries=16").contains("0 to 15"));
        for seconds in ["0", "31536001"] {
            let error = card(&format!("cert,db=/d,cert=a,forget-pin={seconds}"));
            assert_eq!(error, format!("forget-pin={seconds} is not within 1 to 31536000 seconds"));
        }
        assert_eq!(card("cert,db=/d,cert=a,db=/e"), "db is given twice");
        assert_eq!(reader("usbredir,slots=1,slots=2,unix:/x"), "slots is given twice");
        assert!(card("passthru,deadline=0,unix:/x").contains("1 to 3600"));
        assert!(card("passthru,deadline=3").contains("endpoint is missing"));
        assert!(card("cert,cert=a,unix:/x").contains("no endpoint"));
    }
}
