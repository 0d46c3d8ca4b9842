//! Who a card is, and who has it open.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::directory::{FileLock, try_lock};
use super::format::Contents;
use super::record::Record;
use super::{StateDirectory, StateError, hash_with_length, hex};
use crate::keys::Certificate;
use crate::tlv;

/// Of so many certificates, states of earlier versions are looked for under every order; of more, under the one in which
/// they are given.
const MOST_ORDERED: usize = 5;

/// Who a card is: derived from its certificates' public keys, in whatever order, and its name, with nothing random, so
/// that the same certificates make the same card (and the same serial numbers) in each run. A renewed certificate for the
/// same key leaves the card what it is; another key makes another card.
///
/// What [`StateDirectory::claim`] gave is kept in the card's state: the card stays the same for its users even if a
/// later version derives the identity of new cards in another way.
#[derive(Clone)]
pub struct CardId {
    /// Finds the card's state.
    key: [u8; 32],
    /// What the serial numbers are cut from. The same as the key, unless the state says otherwise.
    identity: [u8; 32],
    /// What changes with its certificates while it stays the same card.
    issue: [u8; 8],
    /// Under what earlier versions, for which the order counted, may have left the card's state.
    earlier: Arc<[Ordered]>,
}

/// A card as it was when the order of its certificates counted.
#[derive(Clone, Copy)]
struct Ordered {
    key: [u8; 32],
    /// Which certificate came first, as they are given now: that of files told where the card is.
    first: usize,
    /// Whether this is the order in which they are given now.
    is_given: bool,
}

impl CardId {
    /// The identity of the card with these certificates and this name.
    pub fn derive(certificates: &[Certificate], card_name: &str) -> Self {
        let key_of = |order: &[usize]| -> [u8; 32] {
            let mut hash = Sha256::new_with_prefix("vscard card identity 1\0");
            hash.update((order.len() as u64).to_be_bytes());
            for &index in order {
                hash_with_length(&mut hash, &certificates[index].public_key);
            }
            hash_with_length(&mut hash, card_name.as_bytes());
            hash.finalize().into()
        };
        let given: Vec<_> = (0..certificates.len()).collect();
        let mut sorted = given.clone();
        sorted.sort_by_key(|&index| &certificates[index].public_key);
        let ordered = |order: &[usize]| Ordered {
            key: key_of(order),
            first: order.first().copied().unwrap_or_default(),
            is_given: order == given,
        };
        let mut earlier = vec![ordered(&given)];
        if (2..=MOST_ORDERED).contains(&given.len()) {
            let others = orders(&given).into_iter().filter(|order| *order != given);
            earlier.extend(others.map(|order| ordered(&order)));
        }
        // What it would have been in that order it is in any.
        let key = key_of(&sorted);
        let mut issues: Vec<_> = certificates
            .iter()
            .map(|certificate| issue(&certificate.der).unwrap_or(&certificate.der))
            .collect();
        issues.sort_unstable();
        Self { key, identity: key, issue: issue_of(&key, &issues), earlier: earlier.into() }
    }

    /// The same card after certificates were put on it: `objects`, in a fixed order.
    pub(crate) fn reissued(&self, objects: &[&[u8]]) -> Self {
        Self { issue: issue_of(&self.issue, objects), ..self.clone() }
    }

    /// The GUID of the card holder unique identifier (SP 800-73-4 Part 1 §3.1.2), of a form made for values that
    /// are neither random nor of a name space (RFC 9562 §5.8). Two cards differ in its first 13 bytes: Windows
    /// puts the others to a use of its own.
    ///
    /// Hosts keep what they read of a card by it, so its first 8 bytes follow the certificates, renewed ones too. The
    /// others, PKCS#11's serial number with OpenSC, stay as long as the keys and the name do.
    pub fn guid(&self) -> [u8; 16] {
        let mut guid = self.with_issue();
        guid[6] = 0x80 | guid[6] & 0x0F;
        guid[8] = 0x80 | guid[8] & 0x3F;
        guid
    }

    /// The card's own part of the card identifier in a PIV card's capability container (SP 800-73-4 Part 1 §3.1.1), which
    /// follows the certificates as the GUID does.
    pub(crate) fn piv_card_identifier(&self) -> [u8; 14] {
        self.with_issue()
    }

    fn with_issue<const N: usize>(&self) -> [u8; N] {
        std::array::from_fn(|at| self.issue.get(at).copied().unwrap_or(self.identity[at]))
    }

    /// The card's own part of the card identifier in a CAC's card capability container (GSC-IS 2.1 §7.1), which
    /// middleware takes for the token's serial number: it stays.
    pub(crate) fn card_identifier(&self) -> [u8; 14] {
        self.cut()
    }

    /// The chip's serial number and batch in card production life cycle data.
    pub(crate) fn chip_serial(&self) -> [u8; 6] {
        self.cut()
    }

    /// All are the same beginning, so that whoever sees two of them sees that it is one card.
    fn cut<const N: usize>(&self) -> [u8; N] {
        std::array::from_fn(|at| self.identity[at])
    }

    pub(super) fn key(&self) -> &[u8; 32] {
        &self.key
    }
}

impl PartialEq for CardId {
    fn eq(&self, other: &Self) -> bool {
        (self.key, self.identity) == (other.key, other.identity)
    }
}

impl Eq for CardId {}

impl Hash for CardId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.key, self.identity).hash(state);
    }
}

/// What of a certificate is another in each that is issued for its key (RFC 5280 §4.1.2): serial number, algorithm, issuer
/// and validity. Not the subject and what follows, in which the card's GUID may stand.
fn issue(der: &[u8]) -> Option<&[u8]> {
    let (_, certificate, _) = tlv::read_ber(der)?;
    let (_, fields, _) = tlv::read_ber(certificate)?;
    let start = match tlv::read_ber(fields)? {
        ([0xA0], _, after_version) => after_version,
        _ => fields,
    };
    let mut rest = start;
    for _ in 0..4 {
        (_, _, rest) = tlv::read_ber(rest)?;
    }
    start.get(..start.len() - rest.len())
}

fn issue_of(card: &[u8], parts: &[&[u8]]) -> [u8; 8] {
    let mut hash = Sha256::new_with_prefix("vscard card certificates 1\0");
    hash_with_length(&mut hash, card);
    parts.iter().for_each(|part| hash_with_length(&mut hash, part));
    let digest = hash.finalize();
    std::array::from_fn(|at| digest[at])
}

/// All orders of a few things.
fn orders(things: &[usize]) -> Vec<Vec<usize>> {
    if things.is_empty() {
        return vec![Vec::new()];
    }
    let after = |at: usize| {
        let rest = [&things[..at], &things[at + 1..]].concat();
        orders(&rest).into_iter().map(move |order| [&[things[at]], &order[..]].concat())
    };
    (0..things.len()).flat_map(after).collect()
}

impl std::fmt::Debug for CardId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CardId({})", hex(&self.identity[..4]))
    }
}

impl StateDirectory {
    /// Claims the card `id` of `database` for as long as the result lives.
    ///
    /// `database` is the canonical path, so that one database has one name. The claim is a lock that the kernel
    /// drops with the process, however that ends. The claim's [`CardClaim::id`] is the identity to give the card:
    /// the one it had the first time.
    ///
    /// # Errors
    /// [`StateError::InUse`] while another opener, in this process or another, holds the same card; state that is
    /// damaged or not this user's.
    pub fn claim(&self, database: &Path, id: &CardId) -> Result<CardClaim, StateError> {
        self.claim_at(&[database.to_owned()], id)
    }

    /// As [`claim`](Self::claim), of a card that is in one place or, certificate by certificate, in several.
    pub(crate) fn claim_at(&self, places: &[PathBuf], id: &CardId) -> Result<CardClaim, StateError> {
        let database = place_of(places);
        let record = Record::of_card(self, database, id);
        let earlier = self.earlier_records(places, id)?;
        // An earlier version may have the card, and takes it for another one than this.
        let mut locks = Vec::with_capacity(earlier.len() + 1);
        for stem in [&record].into_iter().chain(earlier.iter().map(|(_, record)| record)).map(Record::stem) {
            let Some(lock) = self.lock_claim(stem)? else {
                return Err(StateError::InUse { database: database.to_owned(), card: hex(&id.key[..4]) });
            };
            locks.push(lock);
        }
        let given = id.earlier.iter().find(|ordered| ordered.is_given).zip(places.first());
        let is_given = given.is_none_or(|(ordered, place)| {
            Record::of_earlier(self, place, &ordered.key).stem() == record.stem()
        });
        // One that cannot be taken over is not passed by, though the disk be full: its tries would begin anew.
        take_over(&record, is_given, &earlier)?;
        let kept = record.read()?.and_then(|contents| contents.identity);
        if kept.is_none() {
            match keep(&record, id.identity) {
                // On a full or read-only disk the card is there, though no PIN is taken.
                Err(error @ StateError::Io { .. }) => {
                    tracing::warn!("the card's identity is not kept: {error}")
                }
                other => other?,
            }
        }
        let identity = kept.unwrap_or(id.identity);
        let id = CardId { identity, ..id.clone() };
        Ok(CardClaim { _locks: locks, database: database.to_owned(), id })
    }

    /// What earlier versions left of this card, or have in hand.
    fn earlier_records(&self, places: &[PathBuf], id: &CardId) -> Result<Vec<(Ordered, Record)>, StateError> {
        let own = Record::of_card(self, place_of(places), id);
        let mut found: Vec<(Ordered, Record)> = Vec::new();
        for ordered in id.earlier.iter() {
            let Some(place) = places.get(ordered.first).or(places.first()) else { continue };
            let record = Record::of_earlier(self, place, &ordered.key);
            let is_known =
                found.iter().map(|(_, record)| record).chain([&own]).any(|one| one.stem() == record.stem());
            if !is_known && (record.has_file("state")? || record.has_file("claim")?) {
                found.push((*ordered, record));
            }
        }
        Ok(found)
    }

    /// Where the tries of a card may be counted, whichever version counts them.
    pub(crate) fn records(&self, places: &[PathBuf], id: &CardId) -> Result<Vec<Record>, StateError> {
        let mut records = vec![Record::of_card(self, place_of(places), id)];
        for (_, record) in self.earlier_records(places, id)? {
            if record.has_file("state")? {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Claims the token that `token` describes, for as long as the result lives.
    ///
    /// # Errors
    /// [`StateError::TokenInUse`] while another card, in this process or another, is on it.
    #[cfg(all(unix, feature = "nss"))]
    pub(crate) fn claim_token(&self, token: &str) -> Result<TokenClaim, StateError> {
        match self.lock_claim(&super::record::token_stem(token))? {
            Some(lock) => Ok(TokenClaim { _lock: lock }),
            None => Err(StateError::TokenInUse { token: token.to_owned() }),
        }
    }

    /// `None` while another has that lock.
    fn lock_claim(&self, stem: &str) -> Result<Option<FileLock>, StateError> {
        let directory = self.open_or_create()?;
        let name = format!("{stem}.claim");
        // The card can be claimed (not verified) where nothing can be written, if it was claimed there before.
        let file = match directory.open_lock_file(&name, OFlags::RDWR) {
            Err(error) if is_read_only(&error) => directory.open_lock_file(&name, OFlags::RDONLY)?,
            other => other?,
        };
        let locked = try_lock(&file).map_err(|source| directory.io_error(&name, "lock", source))?;
        Ok(locked.then(|| FileLock(file)))
    }
}

/// The place that a card's state is found by, whichever certificate comes first.
fn place_of(places: &[PathBuf]) -> &Path {
    places.iter().min().map_or(Path::new(""), PathBuf::as_path)
}

/// Brings the states that earlier versions left of a card, one for each order of its certificates, into one. PIN, PUK and
/// identity are those of the order that is given now, or else of the newest; no try is gained. The others are put aside.
/// `is_given` tells that the place of `record` is that of the order given now.
fn take_over(record: &Record, is_given: bool, earlier: &[(Ordered, Record)]) -> Result<(), StateError> {
    let mut locked = Vec::new();
    for (ordered, record) in earlier {
        if record.has_file("state")? {
            locked.push((ordered, record.lock()?));
        }
    }
    if locked.is_empty() {
        return Ok(());
    }
    let mut own = record.lock()?;
    let mut states = Vec::new();
    if let Some((contents, changed)) = own.read_with_time()? {
        states.push((is_given, changed, contents));
    }
    for (ordered, locked) in &mut locked {
        if let Some((contents, changed)) = locked.read_with_time()? {
            // One from before identities were kept.
            let identity = Some(contents.identity.unwrap_or(ordered.key));
            states.push((ordered.is_given, changed, Contents { identity, ..contents }));
        }
    }
    let least = |counter: fn(&Contents) -> Option<u8>| {
        states.iter().filter_map(|(_, _, contents)| counter(contents)).min()
    };
    let (left, puk_left) = (least(|contents| contents.left), least(|contents| contents.puk_left));
    let chosen = states.into_iter().max_by_key(|(is_given, changed, _)| (*is_given, *changed));
    let Some((.., chosen)) = chosen else { return Ok(()) };
    own.write(&Contents { left, puk_left, ..chosen })?;
    for (_, locked) in locked {
        if let Some(aside) = locked.put_aside()? {
            tracing::info!(
                "the order of certificates makes no other card any more: what was kept under another order is {}",
                aside.display()
            );
        }
    }
    Ok(())
}

fn keep(record: &Record, identity: [u8; 32]) -> Result<(), StateError> {
    let mut locked = record.lock()?;
    let contents = locked.read()?.unwrap_or_default();
    locked.write(&Contents { identity: Some(identity), ..contents })
}

fn is_read_only(error: &StateError) -> bool {
    let StateError::Io { source, .. } = error else { return false };
    source.raw_os_error().map(Errno::from_raw_os_error) == Some(Errno::ROFS)
}

/// A card's hold on its identity, from [`StateDirectory::claim`]. Dropping it lets another opener have the card.
#[derive(Debug)]
pub struct CardClaim {
    _locks: Vec<FileLock>,
    database: PathBuf,
    id: CardId,
}

impl CardClaim {
    /// The identity that is held.
    pub fn id(&self) -> &CardId {
        &self.id
    }

    /// The database of the card.
    pub fn database(&self) -> &Path {
        &self.database
    }
}

/// A card's hold on a token, from [`StateDirectory::claim_token`]. Dropping it lets another card have the token.
#[cfg(all(unix, feature = "nss"))]
#[derive(Debug)]
pub(crate) struct TokenClaim {
    _lock: FileLock,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyKind;

    fn certificate(public_key: &[u8]) -> Certificate {
        Certificate {
            name: "any".into(),
            der: b"any".to_vec(),
            public_key: public_key.to_vec(),
            kind: KeyKind::Rsa { bits: 2048 },
        }
    }

    #[test]
    fn identity_depends_on_keys_and_the_name_and_on_no_order() {
        let id = |keys: &[&[u8]], name| {
            CardId::derive(&keys.iter().map(|key| certificate(key)).collect::<Vec<_>>(), name)
        };
        let ids = [
            id(&[b"a", b"b"], ""),
            id(&[b"ab"], ""),
            id(&[b"a"], "b"),
            id(&[b"a", b"b"], "second"),
            id(&[], ""),
        ];
        for (at, one) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(one), "{at}");
        }
        assert_eq!(ids[0], id(&[b"a", b"b"], ""));
        assert_eq!(ids[0], id(&[b"b", b"a"], ""));
        let five: [&[u8]; 5] = [b"a", b"b", b"c", b"d", b"e"];
        assert_eq!(id(&five, ""), id(&[b"c", b"e", b"a", b"d", b"b"], ""));
        assert_eq!(id(&five, "").earlier.len(), 120);
        assert_eq!(orders(&[1, 2, 3]).len(), 6);
    }

    /// That of files was found by the first of them.
    #[test]
    fn the_order_of_files_makes_no_other_card() {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(root.path().join("state"));
        let keys = |keys: [&[u8]; 2]| CardId::derive(&keys.map(certificate), "");
        let places = |names: [&str; 2]| names.map(PathBuf::from);
        // As an earlier version left it.
        let [a, b] = [&b"a"[..], b"b"];
        let id = keys([b, a]);
        let left = Record::of_earlier(&directory, "/2".as_ref(), &id.earlier[0].key);
        let contents = Contents { identity: Some([7; 32]), ..Contents::default() };
        left.lock().unwrap().write(&contents).unwrap();
        let claim = directory.claim_at(&places(["/1", "/2"]), &keys([a, b])).unwrap();
        assert_eq!(claim.id().identity, [7; 32]);
        assert!(!left.has_file("state").unwrap());
        let refused = directory.claim_at(&places(["/2", "/1"]), &id);
        assert!(matches!(refused, Err(StateError::InUse { .. })));
        drop(claim);
        let claim = directory.claim_at(&places(["/2", "/1"]), &id).unwrap();
        assert_eq!(claim.id().identity, [7; 32]);
    }

    /// Hosts keep what they read by the first half, and users configure programs by the second.
    #[test]
    fn a_renewed_certificate_changes_half_of_the_guid() {
        let issued = |serial: u8, until: &[u8], subject: &[u8]| {
            let field = |tag: u8, value: &[u8]| tlv::ber(&[tag], value);
            let fields = [
                field(0xA0, &field(0x02, &[2])),
                field(0x02, &[serial]),
                field(0x30, b"algorithm"),
                field(0x30, b"issuer"),
                field(0x30, until),
                field(0x30, subject),
            ];
            let der = field(0x30, &field(0x30, &fields.concat()));
            CardId::derive(&[Certificate { der, ..certificate(b"key") }], "")
        };
        let first = issued(1, b"2030", b"Jane");
        for renewed in [issued(2, b"2030", b"Jane"), issued(1, b"2031", b"Jane")] {
            assert_eq!(renewed, first);
            assert_ne!(renewed.guid()[..8], first.guid()[..8]);
            assert_eq!(renewed.guid()[8..], first.guid()[8..]);
            assert_ne!(renewed.piv_card_identifier(), first.piv_card_identifier());
            assert_eq!(renewed.card_identifier(), first.card_identifier());
        }
        // The GUID may stand in it.
        assert_eq!(issued(1, b"2030", b"card 00112233").guid(), first.guid());
        let name = |name| CardId::derive(&[certificate(b"key")], name).guid();
        assert_ne!(name("one")[..8], name("two")[..8]);
    }

    /// Serial numbers are derived from it: another value would be another card for every user.
    #[test]
    fn identity_never_changes() {
        let id = CardId::derive(&[certificate(b"key")], "name");
        assert_eq!(hex(&id.key), "a41fa787c530a6f73c97d143f07a16da1063f1d0a1eb7882388370076834f961");
        assert_eq!(hex(&id.guid()[8..]), "bc97d143f07a16da");
        assert_eq!(hex(&id.card_identifier()), "a41fa787c530a6f73c97d143f07a");
        assert_eq!(hex(&id.chip_serial()), "a41fa787c530");
        assert_eq!(format!("{id:?}"), "CardId(a41fa787)");
    }
}
