//! Keys and certificates on a token that a PKCS#11 module reaches: a smartcard in the host's reader, a security
//! key, an HSM.
//!
//! A [`TokenStore`] is for one insertion: after a removal it fails for good, and the same token put back takes
//! another. What is on a token stays there; private keys are used in place.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use vscard_protocol::{LogBudget, Secret};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{AnyRef, Decode, Reader, SliceReader, Tag, Tagged};

pub use super::module::{Module, ModuleError};
pub use super::watch::{Token, TokenWatch};

pub(crate) use super::watch::ring;

use super::ffi::{TokenInfo, Window};
use super::login::{Keys, Place, WantedKey};
use super::{Content, Found, MAX_CERTIFICATES};
use crate::keys::certificate::{self, Parts};
use crate::keys::{Certificate, KeyStore, UnlockError, Unlocked};
use crate::state::{StateDirectory, StateError, TokenClaim};

/// Longest certificate that is looked at.
const MAX_CERTIFICATE: usize = 0x8000;

/// Why a token cannot be a card.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It is another card's already, of this process or another.
    #[error("the token {label:?} has another card on it already; it can be one card at a time")]
    InUse {
        /// What it calls itself.
        label: String,
    },
    /// Whether it is another card's cannot be known.
    #[error(transparent)]
    Claim(StateError),
    /// It gives no objects.
    #[error("the token {label:?} cannot be read: {reason}")]
    Refused {
        /// What it calls itself.
        label: String,
        /// The NSS error.
        reason: String,
    },
    /// Its PIN is typed on its reader, where a guest has no fingers.
    #[error(
        "the PIN of the token {label:?} is typed on its reader, not sent to it, which a card cannot pass on"
    )]
    PinPad {
        /// What it calls itself.
        label: String,
    },
    /// There is no certificate for a card on it.
    #[error(
        "the token {label:?} has no certificate with a key of its own that a card can have (RSA of 1024 to 4096 bits, \
         P-256, P-384; those of authorities do not count)"
    )]
    NoCertificates {
        /// What it calls itself.
        label: String,
    },
}

/// The keys and certificates of one insertion of a token, for one card only.
///
/// Certificates come in the order of their CKA_ID, at most 24. Those of authorities are left out, and those without a
/// key as far as that is visible before login; a private key that turns out to be missing fails when it is used.
pub struct TokenStore {
    certificates: Vec<Certificate>,
    token: Token,
    keys: Arc<Keys>,
    /// What the token said about tries right after a right PIN. Some say then what was true before it, so that is not
    /// believed until they say something else.
    stale_hint: Mutex<Option<u8>>,
    _claim: Arc<TokenClaim>,
}

impl TokenStore {
    /// Claims `token` in `directory` and reads its certificates.
    ///
    /// # Errors
    /// [`TokenError`], which names the token.
    pub fn open(token: &Token, directory: &StateDirectory) -> Result<Self, TokenError> {
        Self::open_claimed(token, Arc::new(token.claim(directory)?))
    }

    /// As [`open`](Self::open), for whoever has claimed the token by its [`name`](Token::name).
    pub(crate) fn open_claimed(token: &Token, claim: Arc<TokenClaim>) -> Result<Self, TokenError> {
        let label = || token.label().to_owned();
        if token.info.has_pin_pad() {
            return Err(TokenError::PinPad { label: label() });
        }
        let content = Content::read(&token.slot)
            .map_err(|reason| TokenError::Refused { label: label(), reason: reason.to_string() })?;
        let (certificates, wanted): (Vec<_>, _) = usable(&content).into_iter().unzip();
        if certificates.is_empty() {
            return Err(TokenError::NoCertificates { label: label() });
        }
        let place = Place::Token {
            series: token.series,
            needs_login: token.needs_login(),
            pin_lengths: token.info.pin_lengths(),
            window: Window::new(),
        };
        Ok(Self {
            certificates,
            token: token.clone(),
            keys: Arc::new(Keys::new(wanted, Arc::clone(&token.slot), place)),
            stale_hint: Mutex::default(),
            _claim: claim,
        })
    }

    /// The token.
    pub fn token(&self) -> &Token {
        &self.token
    }
}

impl Token {
    /// Keeps other cards from it.
    pub(crate) fn claim(&self, directory: &StateDirectory) -> Result<TokenClaim, TokenError> {
        directory.claim_token(&self.name()).map_err(|error| match error {
            StateError::TokenInUse { .. } => TokenError::InUse { label: self.label().to_owned() },
            error => TokenError::Claim(error),
        })
    }
}

impl fmt::Debug for TokenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStore").field("token", &self.token).finish_non_exhaustive()
    }
}

impl KeyStore for TokenStore {
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        self.token.info.needs_login()
    }

    /// One while the token says that the next try is the last (CKF_USER_PIN_FINAL_TRY), or cannot be asked; none when it
    /// says that its PIN is locked (CKF_USER_PIN_LOCKED).
    fn tries_hint(&self) -> Option<u8> {
        let mut stale = self.stale_hint.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(info) = self.token.current_info() else { return Some(1) };
        let hint = hint(&info);
        if hint != *stale {
            *stale = None;
        }
        hint.filter(|_| stale.is_none())
    }

    /// CKF_USER_PIN_COUNT_LOW and those flags.
    fn was_wrong(&self) -> Option<bool> {
        self.token.current_info().map(|info| info.is_count_low())
    }

    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        let outcome = self.keys.unlock(secret, false);
        let mut stale = self.stale_hint.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(_) => *stale = self.token.current_info().as_ref().and_then(hint),
            Err(UnlockError::Wrong | UnlockError::Locked | UnlockError::Unclear(_)) => *stale = None,
            Err(UnlockError::Unfit(_) | UnlockError::NotChecked(_)) => {}
        }
        Ok(Box::new(outcome?))
    }
}

/// How many tries the token's flags leave, at most.
fn hint(info: &TokenInfo) -> Option<u8> {
    if info.is_locked() { Some(0) } else { info.is_final_try().then_some(1) }
}

/// A token comes and goes as fast as it likes.
static LINES: LogBudget<&str> = LogBudget::new();

fn usable(content: &Content) -> Vec<(Certificate, WantedKey)> {
    // The shorter ID first: they are numbers, where they are not hashes.
    let mut by_id: BTreeMap<(usize, &[u8]), (&Found, Parts)> = BTreeMap::new();
    for found in &content.certificates {
        // Some tokens have no public keys; then every certificate may have its private key.
        let may_have_key = content.key_pairs.is_empty() || content.key_pairs.contains_key(&found.id);
        if found.id.is_empty()
            || !may_have_key
            || found.der.len() > MAX_CERTIFICATE
            || is_authority(&found.der)
        {
            continue;
        }
        let Ok(parts) = certificate::parse(&found.der) else { continue };
        let id = (found.id.len(), &found.id[..]);
        if by_id.get(&id).is_none_or(|(_, other)| other.validity < parts.validity) {
            by_id.insert(id, (found, parts));
        }
    }
    let usable = by_id.into_values().filter_map(|(found, parts)| {
        let name = name_of(found);
        let (public_key, public) = parts
            .key()
            .inspect_err(|unfit| {
                LINES.tell("unfit", |end| {
                    tracing::warn!("certificate {name:?} on the token is left out: {unfit}{end}");
                });
            })
            .ok()?;
        if content.key_pairs.get(&found.id).is_some_and(|half| !half.may_be(&public)) {
            LINES.tell("another's", |end| {
                tracing::warn!(
                    "certificate {name:?} on the token is left out: the key with its ID is another's{end}"
                );
            });
            return None;
        }
        let certificate =
            Certificate { name: name.clone(), der: found.der.clone(), public_key, kind: public.kind() };
        Some((certificate, WantedKey { name, id: found.id.clone(), public }))
    });
    usable.take(MAX_CERTIFICATES).collect()
}

fn name_of(found: &Found) -> String {
    let label: String = String::from_utf8_lossy(&found.nickname).chars().take(64).collect();
    if label.is_empty() { format!("ID {:02x?}", found.id.get(..4).unwrap_or(&found.id)) } else { label }
}

/// Whether basicConstraints make it a certificate of an authority (RFC 5280 §4.2.1.9).
fn is_authority(der: &[u8]) -> bool {
    authority(der).unwrap_or(false)
}

fn authority(der: &[u8]) -> x509_cert::der::Result<bool> {
    const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");

    let certificate = AnyRef::from_der(der)?;
    let tbs = AnyRef::decode(&mut SliceReader::new(certificate.value())?)?;
    let mut fields = SliceReader::new(tbs.value())?;
    while !fields.is_finished() {
        let field = AnyRef::decode(&mut fields)?;
        // RFC 5280 §4.1: extensions [3] EXPLICIT.
        let tag: u8 = field.tag().into();
        if tag != 0xA3 {
            continue;
        }
        let list = AnyRef::from_der(field.value())?;
        let mut extensions = SliceReader::new(list.value())?;
        while !extensions.is_finished() {
            let extension = AnyRef::decode(&mut extensions)?;
            let mut parts = SliceReader::new(extension.value())?;
            if ObjectIdentifier::decode(&mut parts)? != BASIC_CONSTRAINTS {
                continue;
            }
            let mut part = AnyRef::decode(&mut parts)?;
            if part.tag() == Tag::Boolean {
                part = AnyRef::decode(&mut parts)?;
            }
            let constraints = AnyRef::from_der(part.value())?;
            let mut constraints = SliceReader::new(constraints.value())?;
            return Ok(!constraints.is_finished() && bool::decode(&mut constraints)?);
        }
    }
    Ok(false)
}
