//! A card's identity.

use super::*;

#[test]
fn identity_is_kept_in_the_state_and_wins_over_what_would_be_derived_now() {
    let place = Place::new();
    let first = place.claim("").id().clone();
    assert_eq!(first, card(""));
    let file = place.state_file();
    // As a version that derived it otherwise would have left it.
    as_first_version(&file, |text| {
        let at = text.find("identity ").unwrap() + "identity ".len();
        format!("{}{}\n", &text[..at], "5a".repeat(32))
    });
    let kept = place.claim("").id().clone();
    assert_eq!(kept.guid()[8..], [0x9a, 90, 90, 90, 90, 90, 90, 90]);
    // It is the same card: its PIN is found.
    let claim = place.claim("");
    place.own(&claim, Some(&RIGHT.into())).unwrap();
    drop(claim);
    let claim = place.claim("");
    assert_eq!(claim.id(), &kept);
    assert!(ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
    assert!(ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), &card("")).unwrap());
}

#[test]
fn a_card_from_before_identities_were_kept_gets_its_own_and_keeps_pin_and_counter() {
    let place = Place::new();
    let claim = place.claim("");
    let (data, _) = place.own(&claim, Some(&RIGHT.into())).unwrap();
    let store = Store::with(|_| Ok(()));
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    drop(claim);
    as_first_version(&place.state_file(), |text| text[..text.find("identity ").unwrap()].to_owned());
    assert_eq!(data.tries_left().unwrap(), 2);
    assert_eq!(place.claim("").id(), &card(""));
    assert!(fs::read_to_string(place.state_file()).unwrap().contains("\nidentity "));
    assert_eq!(data.tries_left().unwrap(), 2);
    data.verify(&RIGHT.into(), &store).unwrap();
}

#[test]
fn cards_differ_in_the_part_of_the_guid_that_windows_leaves() {
    let guids: Vec<_> = ["", "second", "third"].map(|name| card(name).guid()).into();
    for (at, guid) in guids.iter().enumerate() {
        assert!(guids[..at].iter().all(|other| other[..13] != guid[..13]));
        assert_eq!((guid[6] >> 4, guid[8] >> 6), (8, 2));
    }
}

// ---- states of the version for which the order of certificates counted

/// The card of these keys, in this order.
fn card_of(keys: &[&str]) -> CardId {
    let certificate = |key: &&str| Certificate {
        name: "cert".into(),
        der: Vec::new(),
        public_key: key.as_bytes().to_vec(),
        kind: KeyKind::Rsa { bits: 2048 },
    };
    CardId::derive(&keys.iter().map(certificate).collect::<Vec<_>>(), "")
}

/// What that version named the files of such a card by, and its identity.
fn earlier(keys: &[&str]) -> (String, [u8; 32]) {
    let with_length = |hash: &mut sha2::Sha256, bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    let mut hash = sha2::Sha256::new_with_prefix("vscard card identity 1\0");
    hash.update((keys.len() as u64).to_be_bytes());
    keys.iter().for_each(|key| with_length(&mut hash, key.as_bytes()));
    with_length(&mut hash, b"");
    let identity: [u8; 32] = hash.finalize().into();
    let mut hash = sha2::Sha256::new_with_prefix("vscard state file 1\0");
    with_length(&mut hash, DATABASE.as_bytes());
    with_length(&mut hash, &identity);
    let digits: String = hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    (format!("card-{digits}"), identity)
}

/// Leaves what that version left of a card with a PIN, after so many wrong ones.
fn leave(place: &Place, keys: &[&str], pin: &[u8], wrong: usize) {
    // The one of another database, under the name it had.
    let made = Place::new();
    let claim = made.claim("");
    let (data, ..) = made.own_with_puk(&claim, Some(&pin.into()), Some(&PUK.into())).unwrap();
    for _ in 0..wrong {
        assert!(data.verify(&b"000000"[..].into(), &Store::with(|_| Ok(()))).is_err());
    }
    let (stem, identity) = earlier(keys);
    let digits: String = identity.iter().map(|byte| format!("{byte:02x}")).collect();
    as_first_version(&made.state_file(), |text| {
        format!("{}identity {digits}\n", &text[..text.find("identity ").unwrap()])
    });
    let _ = fs::create_dir(place.directory.path());
    fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
    fs::copy(made.state_file(), place.directory.path().join(format!("{stem}.state"))).unwrap();
    fs::write(place.directory.path().join(format!("{stem}.claim")), "").unwrap();
    fs::set_permissions(
        place.directory.path().join(format!("{stem}.claim")),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
}

fn claim_of(place: &Place, keys: &[&str]) -> Result<CardClaim, StateError> {
    place.directory.claim(DATABASE.as_ref(), &card_of(keys))
}

#[test]
fn the_order_of_certificates_makes_no_other_card() {
    let place = Place::new();
    let claim = claim_of(&place, &["sign", "id"]).unwrap();
    let (data, _) = place.own(&claim, Some(&RIGHT.into())).unwrap();
    for left in [2, 1, 0] {
        assert_wrong(&data.verify(&WRONG.into(), &Store::new()), left);
    }
    assert!(matches!(claim_of(&place, &["id", "sign"]), Err(StateError::InUse { .. })));
    // While it is in use.
    let swapped = card_of(&["id", "sign"]);
    assert!(ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), &swapped).unwrap());
    assert_eq!(data.tries_left().unwrap(), 3);
    let id = claim.id().clone();
    drop(claim);
    let claim = claim_of(&place, &["id", "sign"]).unwrap();
    assert_eq!(claim.id(), &id);
    assert!(ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
}

#[test]
fn a_card_of_any_earlier_order_is_found_with_its_pin_its_tries_and_its_identity() {
    let store = Store::with(|_| Ok(()));
    let given = ["c", "a", "e", "b", "d"];
    for left_by in [["c", "a", "e", "b", "d"], ["a", "b", "c", "d", "e"], ["e", "d", "c", "b", "a"]] {
        let place = Place::new();
        leave(&place, &left_by, RIGHT, 1);
        // As it is: whoever has the card goes on with what there is.
        let id = card_of(&given);
        assert!(ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), &id).unwrap());
        leave(&place, &left_by, RIGHT, 1);
        let claim = claim_of(&place, &given).unwrap();
        let identity = earlier(&left_by).1;
        assert_eq!(claim.id().guid()[8..][1..], identity[9..16]);
        let (data, _) = place.own(&claim, None).unwrap();
        assert_eq!(data.tries_left().unwrap(), 2);
        data.verify(&RIGHT.into(), &store).unwrap();
        data.unblock(&PUK.into(), &NEW.into()).unwrap();
        drop(claim);
        // In any order, and not from what was left.
        let claim = claim_of(&place, &["b", "a", "c", "e", "d"]).unwrap();
        let (data, _) = place.own(&claim, None).unwrap();
        data.verify(&NEW.into(), &store).unwrap();
        place.state_file();
        let aside = fs::read_dir(place.directory.path()).unwrap();
        let aside = aside
            .filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().contains(".replaced-"));
        // The order that the card now has anyway needs no other file.
        assert_eq!(aside.count(), usize::from(left_by != ["a", "b", "c", "d", "e"]));
    }
}

#[test]
fn of_several_the_order_given_now_or_the_newest_decides_and_no_try_is_gained() {
    let store = Store::with(|_| Ok(()));
    for (given, pin) in [(["b", "c", "a"], NEW), (["c", "b", "a"], RIGHT), (["c", "a", "b"], WRONG)] {
        let place = Place::new();
        leave(&place, &["a", "b", "c"], b"111111", 0);
        leave(&place, &["b", "c", "a"], NEW, 2);
        leave(&place, &["c", "b", "a"], RIGHT, 1);
        leave(&place, &["b", "a", "c"], WRONG, 0);
        let times = [["a", "b", "c"], ["b", "c", "a"], ["c", "b", "a"], ["b", "a", "c"]];
        for (days, keys) in times.iter().enumerate() {
            let path = place.directory.path().join(format!("{}.state", earlier(keys).0));
            let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 * (days as u64 + 1));
            fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
        }
        let claim = claim_of(&place, &given).unwrap();
        let (data, _) = place.own(&claim, None).unwrap();
        assert_eq!(data.tries_left().unwrap(), 1);
        data.verify(&pin.into(), &store).unwrap();
        let names = fs::read_dir(place.directory.path()).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        // All but that of the order that the card now has anyway.
        assert_eq!(names.iter().filter(|name| name.contains(".replaced-")).count(), 3, "{names:?}");
        assert_eq!(names.iter().filter(|name| name.ends_with(".state")).count(), 1, "{names:?}");
    }
}

#[test]
fn what_an_earlier_version_has_in_hand_is_in_use_and_is_kept_from_it() {
    let place = Place::new();
    leave(&place, &["b", "a"], RIGHT, 0);
    let file = place.directory.path().join(format!("{}.claim", earlier(&["b", "a"]).0));
    let lock = || {
        let file = fs::File::options().read(true).write(true).open(&file).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map(|()| file)
    };
    let held = lock().unwrap();
    for order in [["a", "b"], ["b", "a"]] {
        assert!(matches!(claim_of(&place, &order), Err(StateError::InUse { .. })));
    }
    drop(held);
    let claim = claim_of(&place, &["a", "b"]).unwrap();
    lock().unwrap_err();
    drop(claim);
    lock().unwrap();
}

#[test]
fn an_earlier_state_that_is_damaged_is_named_and_left() {
    let place = Place::new();
    leave(&place, &["b", "a"], RIGHT, 0);
    let file = place.directory.path().join(format!("{}.state", earlier(&["b", "a"]).0));
    fs::write(&file, "rubbish").unwrap();
    for _ in 0..2 {
        let refused = claim_of(&place, &["a", "b"]).unwrap_err().to_string();
        assert!(refused.contains(file.to_str().unwrap()), "{refused}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "rubbish");
    }
}
