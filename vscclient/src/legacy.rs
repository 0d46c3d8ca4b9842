//! The emulator options string of libcacard's vscclient, `-e 'db="sql:DIR" use_hw=no soft=(,Virtual
//! Reader,CAC,,cert1,cert2,cert3)'`, as documentation everywhere still shows it.
//!
//! Unlike there, a string that cannot be followed is an error and never means "use the hardware".

use thiserror::Error;

/// What an options string asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// The NSS database.
    pub(crate) db: Option<String>,
    /// Whether hardware readers are asked for; not saying so means yes.
    pub(crate) hardware: Option<bool>,
    /// Readers with certificates.
    pub(crate) soft: Vec<Soft>,
}

/// One `soft=(slot,reader,type,parameters,certificate…)`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Soft {
    /// Name of the reader.
    pub(crate) reader: String,
    /// Nicknames of the certificates.
    pub(crate) certificates: Vec<String>,
}

/// Why a string is no options string; offsets are in bytes.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("-e: at offset {offset}: {problem}")]
pub(crate) struct OptionsError {
    offset: usize,
    problem: String,
}

/// Parses an options string.
pub(crate) fn parse(text: &str) -> Result<Options, OptionsError> {
    let mut options = Options::default();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\n', ',']);
        if rest.is_empty() {
            break;
        }
        let offset = text.len() - rest.len();
        let problem = |problem: &str| OptionsError { offset, problem: problem.to_owned() };
        if let Some(value) = rest.strip_prefix("db=") {
            let value = value
                .trim_start_matches([' ', '\t'])
                .strip_prefix('"')
                .ok_or_else(|| problem("the value of db= must stand in double quotes"))?;
            let (path, after) =
                value.split_once('"').ok_or_else(|| problem("the closing quote of db= is missing"))?;
            if path.is_empty() || path.contains('\n') {
                return Err(problem("db= names no directory"));
            }
            if options.db.replace(path.to_owned()).is_some() {
                return Err(problem("db= is given twice"));
            }
            rest = after;
        } else if let Some(value) = rest.strip_prefix("soft=") {
            let value = value.trim_start_matches([' ', '\t']);
            let (fields, after) = value
                .strip_prefix('(')
                .and_then(|value| value.split_once(')'))
                .ok_or_else(|| problem("soft= must be soft=(slot,reader,type,parameters,certificate,...)"))?;
            options.soft.push(soft(fields).map_err(|text| problem(&text))?);
            rest = after;
        } else if let Some(value) = rest.strip_prefix("use_hw=") {
            let (value, after) = word(value);
            options.hardware = Some(use_hardware(value).map_err(|text| problem(&text))?);
            rest = after;
        } else if let Some(value) = rest.strip_prefix("hw_params=") {
            rest = word(value).1;
        } else if let Some(value) = rest.strip_prefix("hw_type=") {
            let (value, after) = word(value);
            if !value.eq_ignore_ascii_case("CAC") {
                return Err(problem(&format!("hw_type={value}: only CAC is known")));
            }
            rest = after;
        } else if rest.starts_with("nssemul") {
            options.hardware = Some(true);
            rest = word(rest).1;
        } else if rest.starts_with("passthru") {
            return Err(problem("passthru (a card in a host reader) is not served"));
        } else {
            let (item, _) = word(rest);
            return Err(problem(&format!(
                "unknown item {item:?}; there are db=, use_hw=, hw_type=, hw_params= and soft="
            )));
        }
    }
    if options == Options::default() {
        return Err(OptionsError { offset: 0, problem: "the string asks for nothing".into() });
    }
    Ok(options)
}

/// Up to the next blank or comma.
fn word(text: &str) -> (&str, &str) {
    text.split_at(text.find([' ', '\t', '\n', ',']).unwrap_or(text.len()))
}

fn use_hardware(value: &str) -> Result<bool, String> {
    match value.as_bytes().first() {
        Some(b'0' | b'N' | b'n' | b'F') => Ok(false),
        Some(b'1' | b'Y' | b'y' | b'T' | b't' | b'r') => Ok(true),
        // libcacard takes both for yes.
        _ => Err(format!("use_hw={value}: write use_hw=no or use_hw=yes")),
    }
}

fn soft(fields: &str) -> Result<Soft, String> {
    let fields: Vec<&str> = fields.split(',').map(|field| field.trim_start_matches([' ', '\t'])).collect();
    let [slot, reader, kind, _parameters, certificates @ ..] = fields.as_slice() else {
        return Err("soft= needs a slot, a reader, a type, parameters and certificates".into());
    };
    if !matches!(*slot, "" | "NSS Certificate DB" | "NSS Generic Crypto Services") {
        return Err(format!("soft=: slot {slot:?} is not the database's own (leave the field empty)"));
    }
    if !kind.eq_ignore_ascii_case("CAC") {
        return Err(format!("soft=: card type {kind:?} is not CAC"));
    }
    // `-c` of the old client leaves an empty field at the end.
    let certificates: Vec<String> =
        certificates.iter().filter(|name| !name.is_empty()).map(|name| (*name).to_owned()).collect();
    if certificates.is_empty() {
        return Err("soft=: no certificate is named".into());
    }
    Ok(Soft { reader: (*reader).to_owned(), certificates })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_documented_string() {
        let options =
            parse(r#"db="sql:/tmp/d b" use_hw=no soft=(,Virtual Reader,CAC,,id-cert,signing-cert,enc)"#)
                .unwrap();
        assert_eq!(options.db.as_deref(), Some("sql:/tmp/d b"));
        assert_eq!(options.hardware, Some(false));
        assert_eq!(
            options.soft,
            [Soft {
                reader: "Virtual Reader".into(),
                certificates: vec!["id-cert".into(), "signing-cert".into(), "enc".into()]
            }]
        );
    }

    #[test]
    fn separators_order_and_case() {
        let options = parse(" ,soft=(, R,cac,, a,b,),\n use_hw=Never,db= \"x\",").unwrap();
        assert_eq!(options.soft[0], Soft { reader: "R".into(), certificates: vec!["a".into(), "b".into()] });
        assert_eq!(options.hardware, Some(false));
        assert_eq!(parse("db=\"x\"").unwrap().hardware, None);
    }

    #[test]
    fn a_wrong_string_is_an_error_that_says_where() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("db=/etc").contains("at offset 0: the value of db= must stand in double quotes"));
        assert!(error("use_hw=no db=\"x").contains("at offset 10: the closing quote"));
        assert!(error("db=\"x\" db=\"y\"").contains("twice"));
        assert!(error("use_hw=off").contains("write use_hw=no"));
        assert!(error("use_hw=false").contains("write use_hw=no"));
        assert!(error("soft=(,R,CAC,,a").contains("soft= must be"));
        assert!(error("soft=(,R,CAC )").contains("needs a slot"));
        assert!(error("soft=(,R,CAC ,,a)").contains("\"CAC \" is not CAC"));
        assert!(error("soft=(,R,CAC,,,)").contains("no certificate"));
        assert!(error("soft=(E-Gate,R,CAC,,a)").contains("slot \"E-Gate\""));
        assert!(error("DB=\"x\"").contains("unknown item"));
        assert!(error("passthru").contains("not served"));
        assert!(error("").contains("asks for nothing"));
    }

    proptest! {
        #[test]
        fn any_string_is_options_or_an_error(text in "(db=|soft=\\(|use_hw=|,|\"|\\)| |CAC|[a-z]){0,30}") {
            let _ = parse(&text);
        }
    }
}
