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
    assert_eq!(kept.guid(), [90, 90, 90, 90, 90, 90, 0x8a, 90, 0x9a, 90, 90, 90, 90, 90, 90, 90]);
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
